// SPDX-License-Identifier: Apache-2.0
// The printable characters that stand for bytes in a byte-level vocabulary, as GPT-2 chose them: printable Latin-1
// stands for itself, the other 68 bytes get the characters from U+0100 on.
#pragma once

#include <array>
#include <cstddef>
#include <optional>
#include <string>
#include <string_view>

namespace kvsparse_tools {

class ByteAlphabet {
 public:
  ByteAlphabet() {
    byte_of_.fill(no_byte);
    unsigned next_stand_in = 0x100;
    for (unsigned byte = 0; byte < 256; ++byte) {
      const bool printable = (byte > 0x20 && byte < 0x7F) || (byte > 0xA0 && byte != 0xAD);
      const unsigned character = printable ? byte : next_stand_in++;
      byte_of_[character] = static_cast<int>(byte);
      symbols_[byte] = utf8(character);
    }
  }

  const std::string& symbol(unsigned char byte) const { return symbols_[byte]; }

  std::string symbols(std::string_view bytes) const {
    std::string text;
    for (const char byte : bytes) text += symbol(static_cast<unsigned char>(byte));
    return text;
  }

  /// Nothing when a character stands for no byte.
  std::optional<std::string> bytes(std::string_view symbols) const {
    std::string bytes;
    for (std::size_t i = 0; i < symbols.size(); ++i) {
      unsigned character = static_cast<unsigned char>(symbols[i]);
      if (character >= 0x80) {  // all of the alphabet beyond ASCII takes two bytes
        if (character < 0xC0 || character >= 0xE0 || i + 1 == symbols.size()) return std::nullopt;
        character = (character & 0x1FU) << 6 | (static_cast<unsigned char>(symbols[++i]) & 0x3FU);
      }
      if (character >= byte_of_.size() || byte_of_[character] == no_byte) return std::nullopt;
      bytes += static_cast<char>(byte_of_[character]);
    }
    return bytes;
  }

 private:
  static constexpr int no_byte = -1;

  static std::string utf8(unsigned character) {
    if (character < 0x80) return {static_cast<char>(character)};
    return {static_cast<char>(0xC0U | character >> 6), static_cast<char>(0x80U | (character & 0x3FU))};
  }

  std::array<std::string, 256> symbols_;
  std::array<int, 0x100 + 68> byte_of_;  // by character
};

}  // namespace kvsparse_tools
