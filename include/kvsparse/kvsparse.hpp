// SPDX-License-Identifier: Apache-2.0
// The umbrella: the policies that most are compared with, cache, attention. Beside it: the other policies in policy/,
// cache/any_cache.hpp, to choose one by name at run time, and interop/, where executors for threads are.
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

/// KV-cache sparsity for long LLM decoding. Start at PagedKvCache and attend(); a SequenceCache has all layers, an
/// AnyCache a policy chosen by name, PageSteering an engine's own pages. policy.hpp says how to write a policy.
namespace kvsparse {}
