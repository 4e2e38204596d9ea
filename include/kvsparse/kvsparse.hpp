// SPDX-License-Identifier: Apache-2.0
// The umbrella: policies, cache, attention. Choosing a policy by name at run time is cache/any_cache.hpp, beside it.
#pragma once

#include "attention/exact.hpp"
#include "cache/attend.hpp"
#include "cache/paged_kv_cache.hpp"
#include "policy/compose.hpp"
#include "policy/dense.hpp"
#include "policy/h2o.hpp"
#include "policy/kindred.hpp"
#include "policy/oracle.hpp"
#include "policy/quest.hpp"
#include "policy/raas.hpp"
#include "policy/random.hpp"
#include "policy/streaming_llm.hpp"
#include "version.hpp"
