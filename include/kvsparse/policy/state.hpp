// SPDX-License-Identifier: Apache-2.0
// The state types that a policy declares, or none.
#pragma once

namespace kvsparse {

/// State of a policy that declares none.
struct NoState {};

namespace detail {

template <class Policy>
struct PageStateOf {
  using type = NoState;
};
template <class Policy>
requires requires { typename Policy::PageState; }
struct PageStateOf<Policy> {
  using type = typename Policy::PageState;
};
template <class Policy>
struct HeadStateOf {
  using type = NoState;
};
template <class Policy>
requires requires { typename Policy::HeadState; }
struct HeadStateOf<Policy> {
  using type = typename Policy::HeadState;
};
template <class Policy>
struct LayerStateOf {
  using type = NoState;
};
template <class Policy>
requires requires { typename Policy::LayerState; }
struct LayerStateOf<Policy> {
  using type = typename Policy::LayerState;
};

}  // namespace detail

/// What the policy keeps of each page.
template <class Policy>
using PageState = typename detail::PageStateOf<Policy>::type;
/// What the policy keeps of each kv head.
template <class Policy>
using HeadState = typename detail::HeadStateOf<Policy>::type;
/// What the policy keeps of the layer.
template <class Policy>
using LayerState = typename detail::LayerStateOf<Policy>::type;

}  // namespace kvsparse
