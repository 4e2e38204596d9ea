// SPDX-License-Identifier: Apache-2.0
#include "byte_level_tokenizer.hpp"

#include <utility>

namespace kvsparse_tools {

namespace {

/// How the pre-tokenizer ByteLevel splits a text when the file does not tell it not to; from GPT-2.
constexpr const char* gpt2_pattern = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

const char* const instead = "; give the prompt by --prompt-ids instead";

/// The vocabulary of the model, once what this reader does not do is refused.
Vocabulary read_vocab(const JsonFields& model, const std::filesystem::path& file, std::size_t vocab_size) {
  if (const nlohmann::json* dropout = model.find("dropout"); dropout != nullptr && *dropout != 0) {
    model.refuse("dropout", *dropout, "this reader drops no merges" + std::string(instead));
  }
  if (model.flag("byte_fallback", false)) {
    model.fail("asks for byte_fallback, as SentencePiece models do; this reader knows byte-level BPE" +
               std::string(instead));
  }
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!model.text(key, "").empty()) {
      model.fail("asks for " + std::string(key) + ", which byte-level BPE does not have" + instead);
    }
  }
  Vocabulary vocab(file, vocab_size);
  for (const auto& [word, id] : model.required_object("vocab").items()) vocab.add(word, id);
  return vocab;
}

}  // namespace

ByteLevelTokenizer::ByteLevelTokenizer(const JsonFields& fields, const JsonFields& model,
                                       const std::filesystem::path& file, std::size_t vocab_size)
    : file_(file),
      vocab_(read_vocab(model, file, vocab_size)),
      added_words_(file, vocab_size),
      whole_pieces_first_(model.flag("ignore_merges", false)),
      merges_(model.required("merges"), vocab_) {
  read_normalizer(fields);
  read_pre_tokenizer(fields);
  read_added_tokens(fields);
  read_post_processor(fields);
  if (const nlohmann::json* decoder = fields.find("decoder")) {
    const std::string type = JsonFields(*decoder, file_, "decoder").text("type", "untyped");
    if (type != "ByteLevel")
      fields.fail("its decoder is " + in_quotes(type) + "; this reader knows ByteLevel" + instead);
  }
}

void ByteLevelTokenizer::read_normalizer(const JsonFields& fields) {
  const nlohmann::json* normalizer = fields.find("normalizer");
  if (normalizer == nullptr) return;
  const std::string type = JsonFields(*normalizer, file_, "normalizer").text("type", "untyped");
  if (type != "NFC") fields.fail("its normalizer is " + in_quotes(type) + "; this reader knows NFC" + instead);
  to_normal_form_c_ = true;
}

void ByteLevelTokenizer::read_pre_tokenizer(const JsonFields& fields) {
  const JsonFields pre_tokenizer(fields.required("pre_tokenizer"), file_, "pre_tokenizer");
  if (pre_tokenizer.text("type", "") != "Sequence") {
    read_splitter(fields.required("pre_tokenizer"), true);
    return;
  }
  const nlohmann::json& steps = pre_tokenizer.array("pretokenizers");
  if (steps.empty()) pre_tokenizer.fail("has no pretokenizers");
  for (const nlohmann::json& step : steps) read_splitter(step, &step == &steps.back());
}

void ByteLevelTokenizer::read_splitter(const nlohmann::json& json, bool is_last) {
  const JsonFields step(json, file_, "pre_tokenizer");
  const std::string type = step.text("type", "untyped");
  if (is_last != (type == "ByteLevel")) {
    step.fail("has " + in_quotes(type) +
              (is_last ? " as its last step, which must be ByteLevel" : " before its last step") +
              "; this reader knows ByteLevel, and Split and Digits before it" + instead);
  }
  if (type == "ByteLevel") {
    if (step.flag("add_prefix_space", true)) {
      step.fail("asks for add_prefix_space, which this reader does not do" + std::string(instead));
    }
    if (step.flag("use_regex", true)) splitters_.emplace_back(gpt2_pattern, file_);
  } else if (type == "Digits") {
    splitters_.emplace_back(step.flag("individual_digits", false) ? R"(\p{N})" : R"(\p{N}+)", file_);
  } else if (type == "Split") {
    const JsonFields pattern(step.required("pattern"), file_, "the pattern of pre_tokenizer Split");
    const std::string behavior = step.text("behavior", "absent");
    if (behavior != "Isolated") {
      step.fail("Split has the behavior " + in_quotes(behavior) + "; this reader knows Isolated" + instead);
    }
    if (step.flag("invert", false))
      step.fail("Split asks for invert, which this reader does not do" + std::string(instead));
    splitters_.emplace_back(pattern.required_text("Regex"), file_);
  } else {
    step.fail("has " + in_quotes(type) + "; this reader knows Split, Digits and ByteLevel" + instead);
  }
}

void ByteLevelTokenizer::read_added_tokens(const JsonFields& fields) {
  for (const nlohmann::json& entry : fields.array("added_tokens")) {
    const JsonFields token(entry, file_, "an entry of added_tokens");
    const std::string word = token.required_text("content");
    if (word.empty() || word.size() > AddedTokens::longest) {
      token.fail("has a content of " + std::to_string(word.size()) + " bytes, from 1 to " +
                 std::to_string(AddedTokens::longest) + " were expected");
    }
    for (const char* key : {"single_word", "lstrip", "rstrip"}) {
      if (token.flag(key, false)) {
        token.fail("asks for " + std::string(key) + ", which this reader does not do" + instead);
      }
    }
    const TokenId id = added_words_.add(word, token.required("id"));
    const std::string* same_id = vocab_.word_of(id);
    if (same_id != nullptr && *same_id != word) {
      token.fail(in_quotes(word) + " has the id " + std::to_string(id) + " of the word " + in_quotes(*same_id));
    }
    const bool special = token.flag("special", false);
    const bool after_normalising = token.flag("normalized", !special);
    (after_normalising ? normalised_added_ : raw_added_).add(after_normalising ? normalised(word) : word, id);
  }
}

void ByteLevelTokenizer::read_post_processor(const JsonFields& fields) {
  const nlohmann::json* json = fields.find("post_processor");
  if (json == nullptr) return;
  const JsonFields processor(*json, file_, "post_processor");
  const nlohmann::json& steps =
      processor.text("type", "") == "Sequence" ? processor.array("processors") : nlohmann::json::array({*json});
  bool has_template = false;
  for (const nlohmann::json& entry : steps) {
    const JsonFields step(entry, file_, "post_processor");
    const std::string type = step.text("type", "untyped");
    if (type == "ByteLevel") continue;  // it moves offsets, not tokens
    if (type != "TemplateProcessing" || std::exchange(has_template, true)) {
      step.fail("has " + in_quotes(type) + "; this reader knows ByteLevel and one TemplateProcessing" + instead);
    }
    read_template(step);
  }
}

/// Ids before and after the text, as the template for a single text has them.
void ByteLevelTokenizer::read_template(const JsonFields& processor) {
  bool text_came = false;
  for (const nlohmann::json& entry : processor.array("single")) {
    const JsonFields part(entry, file_, "the single template of post_processor");
    if (part.find("Sequence") != nullptr) {
      if (std::exchange(text_came, true)) part.fail("has two places for the text");
      continue;
    }
    const JsonFields special(part.required("SpecialToken"), file_, "a SpecialToken of post_processor");
    const JsonFields known(processor.required_object("special_tokens"), file_, "special_tokens of post_processor");
    const std::string name = special.required_text("id");
    if (known.find(name) == nullptr) known.fail("has no " + in_quotes(name));
    const JsonFields token(known.required(name), file_, "a special token of post_processor");
    for (const nlohmann::json& id : token.array("ids")) {
      const auto refuse = [&] { token.refuse("ids", id, "the id of one of its words was expected"); };
      if (!id.is_number_unsigned() || id.get<std::uint64_t>() > UINT32_MAX) refuse();
      const auto value = static_cast<TokenId>(id.get<std::uint64_t>());
      if (added_words_.word_of(value) == nullptr && vocab_.word_of(value) == nullptr) refuse();
      (text_came ? after_ : before_).push_back(value);
    }
  }
  if (!text_came) processor.fail("TemplateProcessing has no place for the text");
}

std::string ByteLevelTokenizer::normalised(std::string_view text) const {
  return to_normal_form_c_ ? normal_form_c(text) : std::string(text);
}

Tokenizer::Encoding ByteLevelTokenizer::encode(const std::string& text) const {
  check_utf8(text);
  Tokenizer::Encoding encoding;
  std::vector<TokenId>& ids = encoding.ids;
  ids = before_;
  encoding.put_before = before_.size();
  for (const AddedTokens::Part& raw : raw_added_.cut(text)) {
    if (raw.token) {
      ids.push_back(*raw.token);
      continue;
    }
    const std::string normal = normalised(raw.text);
    for (const AddedTokens::Part& part : normalised_added_.cut(normal)) {
      if (part.token) {
        ids.push_back(*part.token);
      } else {
        encode_plain(part.text, ids);
      }
    }
  }
  ids.insert(ids.end(), after_.begin(), after_.end());
  return encoding;
}

void ByteLevelTokenizer::encode_plain(std::string_view text, std::vector<TokenId>& ids) const {
  std::vector<std::string> pieces{std::string(text)};
  for (const TextPattern& splitter : splitters_) {
    std::vector<std::string> finer;
    for (const std::string& piece : pieces) {
      for (std::string& part : splitter.split(piece)) finer.push_back(std::move(part));
    }
    pieces = std::move(finer);
  }
  for (const std::string& piece : pieces) encode_piece(piece, ids);
}

void ByteLevelTokenizer::encode_piece(std::string_view piece, std::vector<TokenId>& ids) const {
  if (whole_pieces_first_) {
    if (const auto id = vocab_.id_of(alphabet_.symbols(piece))) {
      ids.push_back(*id);
      return;
    }
  }
  std::vector<TokenId> tokens;
  tokens.reserve(piece.size());
  for (const char byte : piece) {
    const std::string& symbol = alphabet_.symbol(static_cast<unsigned char>(byte));
    const auto id = vocab_.id_of(symbol);
    if (!id) vocab_.fail("its vocab lacks the byte " + in_quotes(symbol) + ", which the text holds");
    tokens.push_back(*id);
  }
  tokens = merges_.apply(std::move(tokens));
  ids.insert(ids.end(), tokens.begin(), tokens.end());
}

std::string ByteLevelTokenizer::text_of(TokenId id, bool /*at_begin*/) const {
  if (const std::string* added = added_words_.word_of(id)) return *added;
  const std::string* word = vocab_.word_of(id);
  if (word == nullptr) return "<" + std::to_string(id) + ">";
  return alphabet_.bytes(*word).value_or(*word);
}

std::optional<TokenId> ByteLevelTokenizer::id_of(const std::string& word) const {
  if (const auto added = added_words_.id_of(word)) return added;
  return vocab_.id_of(alphabet_.symbols(word));
}

}  // namespace kvsparse_tools
