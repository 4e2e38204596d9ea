# SPDX-License-Identifier: Apache-2.0
# Writes build_info.hpp at every build, so that the commit in a result is the commit that was measured.
execute_process(COMMAND git describe --always --dirty --abbrev=12 WORKING_DIRECTORY ${SOURCE_DIR}
                OUTPUT_VARIABLE commit OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
if(failed)
  set(commit "unknown")
endif()
set(text "// Generated at every build.\n#pragma once\n\nnamespace kvsparse_bench::build_info {\n\n")
string(APPEND text "inline constexpr const char* compiler = \"${COMPILER}\";\n")
string(APPEND text "inline constexpr const char* flags = \"${FLAGS}\";\n")
string(APPEND text "inline constexpr const char* commit = \"${commit}\";\n")
string(APPEND text "\n}  // namespace kvsparse_bench::build_info\n")
set(old "")
if(EXISTS ${OUTPUT})
  file(READ ${OUTPUT} old)
endif()
if(NOT text STREQUAL old)
  file(WRITE ${OUTPUT} "${text}")
endif()
