// SPDX-License-Identifier: Apache-2.0
#include "inputs.hpp"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/safetensors.hpp"
#include "common/trace.hpp"
#include "engine/config.hpp"
#include "engine/tokenizer.hpp"

namespace kvsparse_test {

using namespace kvsparse_tools;

void require_clear_sentence(std::string_view sentence) {
  constexpr std::size_t longest = 1000;
  const auto broken = [&](const char* what) {
    throw BrokenPromise(std::string("the refusal ") + what + ": " + std::string(sentence.substr(0, longest)));
  };
  if (sentence.empty()) broken("says nothing");
  if (sentence.size() > longest) broken("is too long");
  for (std::size_t at = 0; at < sentence.size();) {
    const std::size_t bytes = printable_character_bytes(sentence.substr(at));
    if (bytes == 0) broken("has bytes that no terminal should see");
    at += bytes;
  }
}

namespace {

/// A directory of this process alone, gone with it.
class ScratchDirectory {
 public:
  ScratchDirectory() {
    // In memory where that is possible: a fuzzer writes thousands of files a second.
    const std::filesystem::path memory = "/dev/shm";
    std::error_code ignored;
    const bool has_memory = std::filesystem::is_directory(memory, ignored);
    std::string path = ((has_memory ? memory : std::filesystem::temp_directory_path()) / "kvsparse-XXXXXX").string();
    if (mkdtemp(path.data()) == nullptr) throw std::runtime_error("no temporary directory " + path);
    path_ = path;
  }
  ~ScratchDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  ScratchDirectory(const ScratchDirectory&) = delete;
  ScratchDirectory& operator=(const ScratchDirectory&) = delete;

  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path write(const char* name, std::string_view bytes) const {
    std::ofstream out(path_ / name, std::ios::binary | std::ios::trunc);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!out.flush()) throw std::runtime_error("cannot write " + (path_ / name).string());
    return path_ / name;
  }

 private:
  std::filesystem::path path_;
};

const ScratchDirectory& scratch() {
  static const ScratchDirectory directory;
  return directory;
}

std::string refusal_of(const std::function<void()>& read) {
  try {
    read();
  } catch (const FileError& error) {
    require_clear_sentence(error.what());
    return error.what();
  }
  return {};
}

}  // namespace

std::string read_safetensors(std::string_view bytes) {
  const std::filesystem::path path = scratch().write("model.safetensors", bytes);
  return refusal_of([&] {
    const SafetensorsFile file(path);
    for (const auto& [name, info] : file.tensors()) {
      if (file.read_bytes(name).size() != info.end - info.begin) throw BrokenPromise("tensor " + name + " is cut");
      try {
        if (file.read_floats(name).size() != info.elements) throw BrokenPromise("tensor " + name + " lacks elements");
      } catch (const FileError& error) {  // not of a type that can be read
        require_clear_sentence(error.what());
      }
    }
  });
}

std::string read_trace(std::string_view bytes) {
  const std::filesystem::path path = scratch().write("trace.safetensors", bytes);
  return refusal_of([&] {
    const Trace trace = load_trace(path);
    for (std::size_t t = 0; t < trace.tokens; ++t) {
      if (trace.query(t).size() != trace.query_heads * trace.head_dim || trace.key(t).size() != trace.value(t).size())
        throw BrokenPromise("the trace's rows do not fit its shape");
    }
    if (trace.query(trace.tokens - 1).data() + trace.query_heads * trace.head_dim != trace.q.data() + trace.q.size())
      throw BrokenPromise("the trace's queries do not fit its shape");
  });
}

std::string read_config(std::string_view bytes) {
  scratch().write("config.json", bytes);
  return refusal_of([&] {
    const ModelConfig config = load_model_config(scratch().path());
    if (config.kv_heads == 0 || config.query_heads % config.kv_heads != 0 || config.head_dim == 0 ||
        config.layers == 0 || config.vocab_size == 0) {
      throw BrokenPromise("a model without a shape was read");
    }
    if (const std::string problem = config.rope.problem(config.head_dim); !problem.empty())
      throw BrokenPromise("the model's rotation was read, and no cache takes it: " + problem);
    if (!(config.rms_norm_eps <= std::numeric_limits<float>::max())) throw BrokenPromise("rms_norm_eps is no number");
  });
}

std::string read_tokenizer(std::string_view bytes) {
  scratch().write("tokenizer.json", bytes);
  return refusal_of([&] {
    const Tokenizer tokenizer(scratch().path(), 1000);
    for (const char* text : {"", "a b abc  a1", "<|x|>a\n\xC3\xA9 \xE2\x82\xAC", "\xFF"}) {
      try {
        const Tokenizer::Encoding encoding = tokenizer.encode(text);
        for (const TokenId id : encoding.ids) {
          if (id >= 1000) throw BrokenPromise("a token of " + std::to_string(id) + " is beyond the vocabulary");
        }
        require_clear_sentence("it reads '" + printable_text(tokenizer, {}) + "'");
        (void)tokenizer.decode(encoding.ids);
      } catch (const FileError& error) {  // the vocabulary lacks what the text needs
        require_clear_sentence(error.what());
      } catch (const std::invalid_argument& error) {  // the last text is not UTF-8
        require_clear_sentence(error.what());
      }
    }
  });
}

}  // namespace kvsparse_test
