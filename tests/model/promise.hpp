// SPDX-License-Identifier: Apache-2.0
//
// What a test that runs for long, and may be run again to be shrunk, says when something is wrong.
#pragma once

#include <sstream>
#include <stdexcept>

namespace kvsparse_test {

/// A promise was not kept; what() says which.
class Broken : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Throws Broken, with a sentence made of the parts, if the promise was not kept.
template <class... Parts>
void require(bool kept, const Parts&... parts) {
  if (kept) return;
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw Broken(sentence.str());
}

}  // namespace kvsparse_test
