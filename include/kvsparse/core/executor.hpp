// SPDX-License-Identifier: Apache-2.0
// Who runs independent pieces of work. The library owns no thread: a caller who has some passes an executor. Adapters
// are in interop/.
#pragma once

#include <concepts>
#include <cstddef>
#include <memory>
#include <type_traits>

namespace kvsparse {

/// What an executor runs: body(index), for each index of a range. A reference of two pointers, free to copy, valid
/// while the callable it was made of lives. Never throws.
class RangeBody {
 public:
  /// Refers to a callable body(index) that is noexcept.
  template <class Body>
  requires(!std::same_as<std::remove_const_t<Body>, RangeBody> && std::is_object_v<Body> &&
           std::is_nothrow_invocable_v<Body&, std::size_t>) RangeBody(Body& body)
  noexcept
      : body_(const_cast<void*>(static_cast<const void*>(std::addressof(body)))),
        call_([](void* callable, std::size_t index) noexcept { (*static_cast<Body*>(callable))(index); }) {}

  void operator()(std::size_t index) const noexcept { call_(body_, index); }  ///< body(index)

 private:
  void* body_;
  void (*call_)(void*, std::size_t) noexcept;
};

/// A callable executor(count, body) that calls body(i) once for each i in [0, count), in any order and on any threads,
/// and returns when all calls have returned. What was written before it is visible to the bodies, and what they wrote
/// is visible after it. One that throws must do so while no body runs. May have `std::size_t concurrency() const`: how
/// many bodies may run at the same time (0, or no such member: unknown). Work is cut for that many, results never
/// depend on it.
template <class E>
concept Executor = std::is_object_v<std::remove_reference_t<E>> && std::invocable<E&, std::size_t, RangeBody>;

/// True when an executor promises not to throw.
template <class E>
inline constexpr bool is_nothrow_executor = std::is_nothrow_invocable_v<E&, std::size_t, RangeBody>;

/// Everything on the calling thread, in order.
struct SerialExecutor {
  /// body(0), body(1), .. body(count - 1).
  void operator()(std::size_t count, RangeBody body) const noexcept {
    for (std::size_t i = 0; i < count; ++i) body(i);
  }
  static constexpr std::size_t concurrency() { return 1; }  ///< one body at a time
};

/// Refers to any executor, so that code which is compiled once can take every kind. Does not allocate; valid while the
/// executor lives. Throws what the executor throws.
class ExecutorRef {
 public:
  /// Asks the executor for its concurrency() here, once.
  template <Executor E>
  requires(!std::same_as<std::remove_const_t<E>, ExecutorRef>) ExecutorRef(E& executor)
  noexcept
      : executor_(const_cast<void*>(static_cast<const void*>(std::addressof(executor)))),
        run_([](void* self, std::size_t count, RangeBody body) { (*static_cast<E*>(self))(count, body); }) {
    if constexpr (requires {
                    { executor.concurrency() } -> std::convertible_to<std::size_t>;
                  }) {
      concurrency_ = executor.concurrency();
    }
  }

  void operator()(std::size_t count, RangeBody body) const { run_(executor_, count, body); }  ///< executor(count, body)
  std::size_t concurrency() const noexcept { return concurrency_; }  ///< of the executor; 0: unknown

 private:
  void* executor_;
  void (*run_)(void*, std::size_t, RangeBody);
  std::size_t concurrency_ = 0;
};

}  // namespace kvsparse
