// SPDX-License-Identifier: Apache-2.0
// How our programs end: what cannot be done is said in one line on stderr, and the exit code tells a script.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

namespace kvsparse_tools {

inline constexpr int usage_exit_code = 2;

/// Prints one line, whatever the sentence holds.
inline int complain(const std::string& program, std::string sentence, int exit_code) {
  while (!sentence.empty() && sentence.back() == '\n') sentence.pop_back();
  for (char& c : sentence) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  std::fprintf(stderr, "%s: %s\n", program.c_str(), sentence.c_str());
  return exit_code;
}

/// The exit code of run(), which parses the command line and does the work; what it throws becomes a sentence.
template <class Run>
int run_program(const CLI::App& app, const std::string& out_of_memory, Run&& run) {
  const std::string program = app.get_name();
  try {
    return run();
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help
    return complain(program, std::string(error.what()) + " (" + program + " --help lists the options)",
                    usage_exit_code);
  } catch (const std::bad_alloc&) {
    return complain(program, out_of_memory, usage_exit_code);
  } catch (const std::length_error&) {
    return complain(program, out_of_memory, usage_exit_code);
  } catch (const std::exception& error) {
    return complain(program, error.what(), usage_exit_code);
  }
}

}  // namespace kvsparse_tools
