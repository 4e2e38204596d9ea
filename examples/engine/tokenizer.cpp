// SPDX-License-Identifier: Apache-2.0
#include "tokenizer.hpp"

#include <utility>

#include "../common/untrusted_json.hpp"
#include "byte_level_tokenizer.hpp"
#include "json_fields.hpp"
#include "unicode_text.hpp"
#include "word_level_tokenizer.hpp"

namespace kvsparse_tools {

Tokenizer::Tokenizer(const std::filesystem::path& directory, std::size_t vocab_size)
    : file_(directory / "tokenizer.json") {
  const nlohmann::json json = parse_untrusted_json(read_text_file(file_, std::uint64_t{1} << 28), file_, 64);
  const JsonFields fields(json, file_);
  const nlohmann::json* model = fields.find("model");
  if (model == nullptr) fields.fail("has no model");
  const JsonFields model_fields(*model, file_, "model");
  for (const char* key : {"truncation", "padding"}) {
    if (fields.find(key) != nullptr) fields.fail("it asks for " + std::string(key) + ", which this reader does not do");
  }
  // Files from before the field existed have merges and no type.
  const std::string type = model_fields.text("type", model_fields.find("merges") != nullptr ? "BPE" : "untyped");
  if (type == "BPE") {
    kind_ = std::make_shared<ByteLevelTokenizer>(fields, model_fields, file_, vocab_size);
  } else if (type == "WordLevel") {
    kind_ = std::make_shared<WordLevelTokenizer>(fields, model_fields, file_, vocab_size);
  } else {
    fields.fail("its model is " + in_quotes(type) +
                "; this reader knows BPE and WordLevel, give the prompt by --prompt-ids instead");
  }
}

std::string TextStream::push(TokenId token) {
  waiting_ += tokenizer_.text_of(token, std::exchange(at_begin_, false));
  std::string whole = waiting_.substr(0, waiting_.size() - unfinished_utf8_bytes(waiting_));
  waiting_.erase(0, whole.size());
  return printable_utf8(whole);
}

std::string TextStream::finish() { return printable_utf8(std::exchange(waiting_, {})); }

std::string printable_text(const Tokenizer& tokenizer, const std::vector<TokenId>& ids) {
  return printable_utf8(tokenizer.decode(ids));
}

}  // namespace kvsparse_tools
