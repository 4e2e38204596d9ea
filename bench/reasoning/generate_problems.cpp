// SPDX-License-Identifier: Apache-2.0
// Writes LemmaChain problems, one JSON object a line, or the tokenizer that their words need.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "common/output_file.hpp"
#include "common/program.hpp"
#include "lemma_chain.hpp"

namespace {

using namespace kvsparse_tools;
using Json = nlohmann::ordered_json;

std::string spaced(const lemma_chain::Words& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

/// What a trainer must know of a problem beyond its words: see LemmaChain::Line.
Json line_facts(const LemmaChain& problem) {
  Json lines = Json::array();
  for (const LemmaChain::Line& line : problem.lines) {
    lines.push_back({line.begin, line.end, line.source, line.definition_begin, line.definition_end,
                     Json(line.informative), Json(line.fed)});
  }
  return lines;
}

Json tokenizer(LineFormat format) {
  Json vocabulary = Json::object();
  std::size_t id = 0;
  for (const std::string& word : lemma_chain::vocabulary(format)) vocabulary[word] = id++;
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", Json::array()},
          {"normalizer", nullptr},
          {"pre_tokenizer", {{"type", "WhitespaceSplit"}}},
          {"post_processor", nullptr},
          {"decoder", nullptr},
          {"model", {{"type", "WordLevel"}, {"vocab", vocabulary}, {"unk_token", "<bos>"}}}};
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Writes LemmaChain problems, one JSON object a line: prompt, chain, answer.", "generate_problems");
  std::string rule = "fall", format = "plain", output = "/dev/stdout";
  std::size_t lines = 48, count = 1;
  std::uint64_t seed = 1;
  bool with_lines = false, only_tokenizer = false;
  app.add_option("--set", rule, "what a line cites: fall, fall:gmax=6,life=24, mile, lru, age, uniform [fall]");
  app.add_option("--format", format, "plain, varied or long [plain]");
  app.add_option("--lines", lines, "lines per chain [48]");
  app.add_option("--count", count, "problems [1]");
  app.add_option("--seed", seed, "the same seed writes the same problems on every machine [1]");
  app.add_option("--output", output, "file [/dev/stdout]");
  app.add_flag("--with-lines", with_lines,
               "add 'lines': [begin, end, cited line, definition begin, definition end, [informative], [fed]]");
  app.add_flag("--tokenizer", only_tokenizer, "write the format's tokenizer.json instead");
  return run_program(app, "not enough memory for these problems", [&] {
    app.parse(argc, argv);
    const LineFormat line_format = parse_line_format(format);
    const SourceRule source_rule = SourceRule::parse(rule);
    write_file(output, [&](std::ostream& out) {
      if (only_tokenizer) {
        out << tokenizer(line_format).dump() << '\n';
        return;
      }
      for (std::size_t i = 0; i < count; ++i) {
        const LemmaChain problem = make_lemma_chain(source_rule, line_format, lines, seed, i);
        Json json{{"prompt", spaced(problem.prompt)}, {"chain", spaced(problem.chain)}, {"answer", problem.answer}};
        if (with_lines) json["lines"] = line_facts(problem);
        out << json.dump() << '\n';
      }
    });
    return 0;
  });
}
