// SPDX-License-Identifier: Apache-2.0
// Byte-level BPE: a text is cut at its added tokens, normalised, split into pieces by patterns, and each piece's bytes
// are merged into tokens. The order of these steps is that of Hugging Face's tokenizers.
#pragma once

#include <cstddef>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "added_tokens.hpp"
#include "byte_alphabet.hpp"
#include "byte_pair_merges.hpp"
#include "json_fields.hpp"
#include "tokenizer.hpp"
#include "unicode_text.hpp"
#include "vocabulary.hpp"

namespace kvsparse_tools {

class ByteLevelTokenizer : public Tokenizer::Kind {
 public:
  /// Throws FileError.
  ByteLevelTokenizer(const JsonFields& fields, const JsonFields& model, const std::filesystem::path& file,
                     std::size_t vocab_size);

  Tokenizer::Encoding encode(const std::string& text) const override;
  std::string text_of(TokenId id, bool at_begin) const override;
  /// `word` is a whole token as text: an added token, or the bytes of another.
  std::optional<TokenId> id_of(const std::string& word) const override;

 private:
  void read_added_tokens(const JsonFields& fields);
  void read_normalizer(const JsonFields& fields);
  void read_pre_tokenizer(const JsonFields& fields);
  void read_splitter(const nlohmann::json& json, bool is_last);
  void read_post_processor(const JsonFields& fields);
  void read_template(const JsonFields& processor);

  std::string normalised(std::string_view text) const;
  void encode_plain(std::string_view text, std::vector<TokenId>& ids) const;
  void encode_piece(std::string_view piece, std::vector<TokenId>& ids) const;

  std::filesystem::path file_;
  ByteAlphabet alphabet_;
  Vocabulary vocab_;
  Vocabulary added_words_;
  AddedTokens raw_added_, normalised_added_;  // looked for before and after normalisation
  bool to_normal_form_c_ = false;
  std::vector<TextPattern> splitters_;  // applied one after the other
  bool whole_pieces_first_;             // a piece that is a word is that token, whatever the merges would make of it
  BytePairMerges merges_;
  std::vector<TokenId> before_, after_;  // what the post_processor puts around a text
};

}  // namespace kvsparse_tools
