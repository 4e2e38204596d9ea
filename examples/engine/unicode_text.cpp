// SPDX-License-Identifier: Apache-2.0
#include "unicode_text.hpp"

#include <unicode/normalizer2.h>
#include <unicode/regex.h>
#include <unicode/unistr.h>
#include <unicode/utf8.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>

#include "../common/file_error.hpp"

namespace kvsparse_tools {

namespace {

std::int32_t icu_length(std::string_view text) {
  constexpr auto limit = static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()) / 4;
  if (text.size() > limit) {
    throw std::invalid_argument("the text has " + std::to_string(text.size()) + " bytes, the limit is " +
                                std::to_string(limit));
  }
  return static_cast<std::int32_t>(text.size());
}

icu::UnicodeString utf16(std::string_view text) {
  return icu::UnicodeString::fromUTF8(icu::StringPiece(text.data(), icu_length(text)));
}

std::string utf8(const icu::UnicodeString& text) {
  std::string out;
  return text.toUTF8String(out);
}

/// How many bytes a character takes that begins with this one; 0 when none does.
std::size_t announced_bytes(char first) {
  const auto lead = static_cast<std::uint8_t>(first);
  if (lead < 0x80) return 1;
  return U8_IS_LEAD(lead) ? static_cast<std::size_t>(U8_COUNT_TRAIL_BYTES(lead)) + 1 : 0;
}

/// Whether some character begins with all of these bytes, at least one.
bool begins_character(std::string_view bytes) {
  const auto lead = static_cast<std::uint8_t>(bytes.front());
  const std::size_t announced = announced_bytes(bytes.front());
  if (bytes.size() > announced) return false;
  if (bytes.size() == 1) return true;
  const auto second = static_cast<std::uint8_t>(bytes[1]);
  if (announced == 3 && !U8_IS_VALID_LEAD3_AND_T1(lead, second)) return false;
  if (announced == 4 && !U8_IS_VALID_LEAD4_AND_T1(lead, second)) return false;
  return std::all_of(bytes.begin() + 1, bytes.end(), [](char byte) { return U8_IS_TRAIL(byte); });
}

/// Bytes of the character that `text` begins with; 0 when there is none.
std::size_t character_bytes(std::string_view text) {
  const std::size_t bytes = announced_bytes(text.front());
  return bytes != 0 && text.size() >= bytes && begins_character(text.substr(0, bytes)) ? bytes : 0;
}

/// Walks over a pattern and refuses what two dialects may read differently.
class DialectCheck {
 public:
  explicit DialectCheck(std::string_view pattern) : pattern_(pattern) {}

  /// The first part that is not accepted; empty when all is well.
  std::string problem() {
    while (at_ < pattern_.size()) {
      const std::size_t begin = at_;
      if (!element()) return std::string(pattern_.substr(begin, std::max<std::size_t>(at_ - begin, 1)));
    }
    return {};
  }

 private:
  bool starts_with(std::string_view text) const { return pattern_.substr(at_, text.size()) == text; }
  bool take(std::string_view text) {
    if (!starts_with(text)) return false;
    at_ += text.size();
    return true;
  }

  bool element() {
    const char c = pattern_[at_];
    if (c == '\\') return escape();
    if (c == '[') return character_class();
    if (c == '?' || c == '*' || c == '+' || c == '{') return quantifier();
    if (c == '.' || c == '^' || c == '$' || c == '}' || c == ']') return false;
    if (take("(?")) return take(":") || take("i:") || take("!") || take("=");
    ++at_;
    return true;
  }

  bool escape() {
    ++at_;
    if (at_ == pattern_.size()) return false;
    const char c = pattern_[at_++];
    if (c == 'p' || c == 'P') return category();
    if (std::string_view("sSrnt").find(c) != std::string_view::npos) return true;
    return std::ispunct(static_cast<unsigned char>(c)) != 0;
  }

  bool category() {
    if (!take("{")) return false;
    const std::size_t begin = at_;
    while (at_ < pattern_.size() && std::isalpha(static_cast<unsigned char>(pattern_[at_]))) ++at_;
    return at_ - begin >= 1 && at_ - begin <= 2 && take("}");
  }

  bool character_class() {
    ++at_;
    take("^");
    if (starts_with("]")) return false;
    while (at_ < pattern_.size()) {
      if (take("]")) return true;
      if (starts_with("[") || starts_with("&") || starts_with("--")) return false;
      if (starts_with("\\")) {
        if (!escape()) return false;
      } else {
        ++at_;
      }
    }
    return false;
  }

  bool quantifier() {
    if (!take("?") && !take("*") && !take("+") && !bounds()) return false;
    // Lazy and possessive quantifiers, and repeated ones, are where the dialects part.
    const bool ends = at_ == pattern_.size() || std::string_view("?*+{").find(pattern_[at_]) == std::string_view::npos;
    at_ += ends ? 0 : 1;
    return ends;
  }

  bool bounds() {
    take("{");
    if (!number()) return false;
    if (take(",") && !starts_with("}") && !number()) return false;
    return take("}");
  }

  bool number() {
    const std::size_t begin = at_;
    while (at_ < pattern_.size() && std::isdigit(static_cast<unsigned char>(pattern_[at_]))) ++at_;
    return at_ > begin && at_ - begin <= 3;
  }

  std::string_view pattern_;
  std::size_t at_ = 0;
};

}  // namespace

void check_utf8(std::string_view text) {
  (void)icu_length(text);
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t bytes = character_bytes(text.substr(at, 4));
    if (bytes == 0) {
      constexpr char digits[] = "0123456789abcdef";
      const auto byte = static_cast<unsigned char>(text[at]);
      throw std::invalid_argument("the text is not UTF-8: no character begins with the byte 0x" +
                                  std::string{digits[byte >> 4], digits[byte & 15U]} + " at offset " +
                                  std::to_string(at) + " and what follows it");
    }
    at += bytes;
  }
}

std::string printable_utf8(std::string_view text) { return utf8(utf16(text)); }

std::size_t unfinished_utf8_bytes(std::string_view text) {
  for (std::size_t bytes = std::min<std::size_t>(text.size(), 3); bytes > 0; --bytes) {
    const std::string_view tail = text.substr(text.size() - bytes);
    if (begins_character(tail) && bytes < announced_bytes(tail.front())) return bytes;
  }
  return 0;
}

std::string normal_form_c(std::string_view text) {
  UErrorCode error = U_ZERO_ERROR;
  const icu::Normalizer2* nfc = icu::Normalizer2::getNFCInstance(error);
  const icu::UnicodeString normal = U_SUCCESS(error) ? nfc->normalize(utf16(text), error) : icu::UnicodeString();
  if (U_FAILURE(error)) throw std::runtime_error(std::string("ICU cannot normalise the text: ") + u_errorName(error));
  return utf8(normal);
}

struct TextPattern::Compiled {
  std::unique_ptr<icu::RegexPattern> pattern;
};

TextPattern::TextPattern(const std::string& pattern, std::filesystem::path file) : file_(std::move(file)) {
  if (const std::string part = DialectCheck(pattern).problem(); !part.empty()) {
    throw FileError(file_, "its pattern " + in_quotes(pattern) + " has the part " + in_quotes(part) +
                               ", which this reader does not know");
  }
  UErrorCode error = U_ZERO_ERROR;
  UParseError where{};
  auto compiled = std::make_shared<Compiled>();
  compiled->pattern.reset(icu::RegexPattern::compile(utf16(pattern), 0, where, error));
  if (U_FAILURE(error)) {
    throw FileError(file_, "its pattern " + in_quotes(pattern) + " is no regular expression: " + u_errorName(error));
  }
  compiled_ = std::move(compiled);
}

std::vector<std::string> TextPattern::split(std::string_view text) const {
  constexpr std::int32_t time_limit = 2000;        // in ICU's units of about a millisecond
  constexpr std::int32_t stack_limit = 512 << 20;  // bytes; a million blanks need more than ICU's own 8 MiB
  UErrorCode error = U_ZERO_ERROR;
  const icu::UnicodeString subject = utf16(text);
  const std::unique_ptr<icu::RegexMatcher> matcher(compiled_->pattern->matcher(subject, error));
  if (matcher != nullptr) {
    matcher->setTimeLimit(time_limit, error);
    matcher->setStackLimit(stack_limit, error);
  }
  std::vector<std::string> pieces;
  std::int32_t done = 0;
  const auto cut_at = [&](std::int32_t end) {
    if (end > done) pieces.push_back(utf8(subject.tempSubStringBetween(done, end)));
    done = end;
  };
  while (U_SUCCESS(error) && matcher->find(error) != 0) {
    cut_at(matcher->start(error));
    cut_at(matcher->end(error));
  }
  if (U_FAILURE(error)) {
    throw FileError(file_, std::string("its pattern cannot be matched with this text: ") + u_errorName(error));
  }
  cut_at(subject.length());
  return pieces;
}

}  // namespace kvsparse_tools
