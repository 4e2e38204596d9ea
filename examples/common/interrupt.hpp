// SPDX-License-Identifier: Apache-2.0
// Ctrl-C asks long work to stop at the next step, so that what is finished can still be written.
#pragma once

#include <csignal>

namespace kvsparse_tools {

namespace detail {
inline volatile std::sig_atomic_t interrupt_seen = 0;
inline void note_interrupt(int signal) {
  interrupt_seen = 1;
  std::signal(signal, SIG_DFL);  // a second Ctrl-C ends the program at once
}
}  // namespace detail

/// The exit code of a run that was stopped early, as a shell reports a SIGINT.
inline constexpr int interrupted_exit_code = 130;

inline void catch_interrupts() {
  std::signal(SIGINT, detail::note_interrupt);
  std::signal(SIGTERM, detail::note_interrupt);
}

inline bool interrupted() { return detail::interrupt_seen != 0; }

}  // namespace kvsparse_tools
