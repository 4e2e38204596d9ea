#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the engine's byte-level BPE against one written here straight from the algorithm: slow, with Python's own
Unicode tables and Debian's python3-regex.

    check_tokenizer.py path/to/tokenizer_probe

The tokenizer.json files are made here, in the manner of GPT-2, Llama 3, Qwen2 and of models that cut digits apart, with
merges learned from a little text, and the same merges in an order that no training would give. Then files that must be
refused are tried. Exit code 0 when all agree.
"""
import collections
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time
import unicodedata

import regex

TEXTS = 250  # per tokenizer
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
          r"\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
CASED = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
         r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# Every kind of text that one of the patterns treats in its own way.
FRAGMENTS = """the The THE don't DON'T we'll WE'LL I'm 'S 'ſ '' 'x o'clock l'eau naïve Straße ΑΒΓ привет мир שלום مرحبا हिन्दी
ไทย 日本語 中文字符 한국어 각 각 e\u0301 é ñ n\u0303 ô\u0323 \u0301 \u0308\u0301 ﬁ Ω Å K ǆ ʰ ª º 0 1 12 123 1234 12345678901 ½ ² Ⅷ ٣٤٥ १२ 〇
😀 👩‍👩‍👧‍👦 🇩🇪 ❤️ 👍🏽 𝒳 𐍈 \u200b \u200d \ufeff \u00ad \u180e ! ... ?! -- === // /* */ {} [] () ; _ __x__ a_b x=1; 3.14 1,000 http://a.b/c?d=e#f @ #
€ £ ° „ “ ” « … — \\ ` ~ ^ | < > <| |> <|end <|end|> <|end|>er <|begin|> <ﬁ> end""".split()
BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\r\n", " \n", "\n ", "\t", "\t\t", " \t ", "\u00a0", "\u2003", "\u3000", "\u0085",
          "\u000b", "\u000c", "\u2028", "\u001f", "\0"]


def random_text(rng):
    parts = []
    for _ in range(rng.randrange(0, 14)):
        kind = rng.random()
        if kind < 0.6:
            parts.append(rng.choice(FRAGMENTS))
        elif kind < 0.9:
            parts.append(rng.choice(BLANKS))
        else:  # any character that Unicode 3.2 already had: its properties are old enough for everybody
            code = rng.randrange(0x20, 0x30000)
            if unicodedata.ucd_3_2_0.category(chr(code)) not in ("Cn", "Cs"):
                parts.append(chr(code))
    return "".join(parts)


# --------------------------------------------------------------------------------------------------------- the reference
def byte_characters():
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + n) for n, byte in enumerate(others)}}


CHARACTER = byte_characters()
BYTE = {character: byte for byte, character in CHARACTER.items()}


class Reference:
    def __init__(self, description):
        self.description = description
        model = description["model"]
        self.vocab = model["vocab"]
        self.words = {id: word for word, id in self.vocab.items()}
        self.ranks = {tuple(m.split(" ")) if isinstance(m, str) else tuple(m): n for n, m in enumerate(model["merges"])}
        self.added = {token["content"]: token["id"] for token in description["added_tokens"]}

    def merge(self, word):
        parts = [CHARACTER[byte] for byte in word]
        while len(parts) > 1:
            rank, at = min((self.ranks.get((parts[i], parts[i + 1]), 10**9), i) for i in range(len(parts) - 1))
            if rank == 10**9:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.vocab[part] for part in parts]

    def pieces(self, text):
        steps = self.description["pre_tokenizer"]
        parts = [text]
        for step in steps.get("pretokenizers", [steps]):
            if step["type"] == "Split":
                pattern = step["pattern"]["Regex"]
            elif step["type"] == "Digits":
                pattern = r"\p{N}" if step["individual_digits"] else r"\p{N}+"
            elif step.get("use_regex", True):
                pattern = GPT2
            else:
                continue
            finer = []
            for part in parts:
                cuts = [0, *(at for match in regex.finditer(pattern, part) for at in match.span()), len(part)]
                finer += [part[a:b] for a, b in zip(cuts, cuts[1:]) if a < b]
            parts = finer
        return parts

    def cut(self, text, normalised):
        """Pairs of text and id: leftmost added tokens, the longest first."""
        words = sorted((t["content"] for t in self.description["added_tokens"] if t["normalized"] == normalised),
                       key=len, reverse=True)
        out, plain, at = [], "", 0
        while at < len(text):
            word = next((w for w in words if text.startswith(self.normal(w) if normalised else w, at)), None)
            if word is None:
                plain, at = plain + text[at], at + 1
            else:
                out += [(plain, None), (word, self.added[word])]
                plain, at = "", at + len(self.normal(word) if normalised else word)
        return [(part, id) for part, id in [*out, (plain, None)] if part]

    def normal(self, text):
        return unicodedata.normalize("NFC", text) if self.description["normalizer"] else text

    def encode(self, text):
        ids = []
        for raw, id in self.cut(text, False):
            for part, id in [(raw, id)] if id is not None else self.cut(self.normal(raw), True):
                if id is not None:
                    ids.append(id)
                    continue
                for piece in self.pieces(part):
                    word = piece.encode()
                    whole = "".join(CHARACTER[byte] for byte in word)
                    if self.description["model"]["ignore_merges"] and whole in self.vocab:
                        ids.append(self.vocab[whole])
                    else:
                        ids += self.merge(word)
        return ids

    def bytes_of(self, id):
        content = next((word for word, known in self.added.items() if known == id), None)
        if content is not None:
            return content.encode()
        return bytes(BYTE[c] for c in self.words[id]) if id in self.words else f"<{id}>".encode()


# -------------------------------------------------------------------------------------------------- tokenizer.json files
def learn_merges(pattern, texts, count):
    """The usual training: the commonest pair of neighbours becomes a token."""
    words = collections.Counter(
        tuple(CHARACTER[b] for b in match.group().encode()) for text in texts for match in regex.finditer(pattern, text))
    merges = []
    for _ in range(count):
        pairs = collections.Counter()
        for word, times in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += times
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = collections.Counter()
        for word, times in words.items():
            parts, i = [], 0
            while i < len(word):
                parts.append("".join(word[i : i + 2]) if word[i : i + 2] == best else word[i])
                i += 2 if word[i : i + 2] == best else 1
            merged[tuple(parts)] += times
        words = merged
    return merges


def describe(kind, merges, as_pairs, rng):
    vocab_words = list(CHARACTER.values()) + list(dict.fromkeys(a + b for a, b in merges))
    ids = list(range(len(vocab_words)))
    rng.shuffle(ids)
    first_added = len(ids) + 3  # a hole: ids need not be dense
    added = [{"id": first_added + n, "content": word, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": normalised, "special": not normalised}
             for n, (word, normalised) in enumerate([("<|begin|>", False), ("<|end|>", False), ("<|end|>er", False),
                                                     ("Å<", True), ("{}", True)])]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    steps = {
        "gpt2": byte_level,
        "llama3": {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": LLAMA3}},
                                                         {**byte_level, "use_regex": False}]},
        "qwen2": {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": QWEN2}},
                                                        {**byte_level, "use_regex": False}]},
        "cased": {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": CASED}},
                                                        {**byte_level, "use_regex": False}]},
        "digits": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level]},
    }[kind]
    post = {"type": "ByteLevel", "trim_offsets": False}
    if kind == "llama3":
        template = {"type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "<|begin|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {"<|begin|>": {"id": "<|begin|>", "ids": [first_added], "tokens": ["<|begin|>"]}}}
        post = {"type": "Sequence", "processors": [post, template]}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": {"type": "NFC"} if kind == "qwen2" else None, "pre_tokenizer": steps, "post_processor": post,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": kind == "llama3",
                  "vocab": dict(zip(vocab_words, ids)),
                  "merges": [list(m) if as_pairs else " ".join(m) for m in merges]},
    }


def largest_id(description):
    return max(*description["model"]["vocab"].values(), *(t["id"] for t in description["added_tokens"]))


# ------------------------------------------------------------------------------------------------------------ the checks
failures = []


def check(condition, what):
    if not condition:
        failures.append(what)
        print("FAILED: " + what)


# All bytes that may wait for the rest of a character.
BEGINNINGS = {chr(code).encode()[:length] for code in range(0x80, 0x110000, 64) if not 0xD800 <= code < 0xE000
              for length in range(1, len(chr(code).encode()))}


class Probe:
    def __init__(self, binary, directory, vocab_size):
        self.process = subprocess.Popen([binary, directory, str(vocab_size)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)

    def ask(self, request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def encode(self, data):
        return self.ask({"encode": data.hex()})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        check(self.process.wait(60) == 0, "the probe's exit code")


def check_decoding(probe, reference, ids, what):
    reply = probe.ask({"decode": ids})
    expected = [reference.bytes_of(id) for id in ids]
    check(bytes.fromhex(reply["text"]) == b"".join(expected), f"{what}: decoded bytes of {ids}")
    waiting, shown = b"", []
    for data in expected:
        waiting += data
        hold = max((n for n in (1, 2, 3) if n <= len(waiting) and waiting[-n:] in BEGINNINGS), default=0)
        shown.append(waiting[: len(waiting) - hold].decode("utf-8", "replace"))
        waiting = waiting[len(waiting) - hold :]
    shown.append(waiting.decode("utf-8", "replace"))
    check([bytes.fromhex(part).decode() for part in reply["stream"]] == shown, f"{what}: stream of {ids}")
    check("".join(shown) == b"".join(expected).decode("utf-8", "replace"), f"{what}: the reference's own stream")


def check_kind(binary, root, kind, order, as_pairs):
    rng = random.Random(f"{kind} {order} {as_pairs}")
    corpus = [random_text(rng) for _ in range(150)] + FRAGMENTS * 3
    merges = learn_merges({"gpt2": GPT2, "digits": GPT2, "cased": CASED}.get(kind, LLAMA3), corpus, 400)
    if order == "shuffled":
        rng.shuffle(merges)
    description = describe(kind, merges, as_pairs, rng)
    what = f"{kind}, {order} merges"
    (root / "tokenizer.json").write_text(json.dumps(description, ensure_ascii=as_pairs))
    reference = Reference(description)
    used = set()
    with Probe(binary, root, largest_id(description) + 1) as probe:
        begin = [reference.added["<|begin|>"]] if kind == "llama3" else []
        for text in ["", " ", "a", *FRAGMENTS, *BLANKS, *(random_text(rng) for _ in range(TEXTS))]:
            expected = begin + reference.encode(text)
            got = probe.encode(text.encode()).get("ids")
            check(got == expected, f"{what}: {text!r} became {got}, not {expected}")
            used.update(expected)
            back = "".join(reference.bytes_of(id).decode("utf-8", "surrogateescape") for id in expected[len(begin):])
            if not any(word in text for word in ("Å", "<", "{}")):  # added tokens come back as the file spells them
                round_trip = back.encode("utf-8", "surrogateescape").decode()
                check(round_trip == reference.normal(text), f"{what}: {text!r} comes back as {round_trip!r}")
            check_decoding(probe, reference, expected, what)
        for _ in range(TEXTS):  # ids that no text gives: characters broken off, words that do not exist
            check_decoding(probe, reference, [rng.randrange(largest_id(description) + 20) for _ in range(12)], what)
            alphabet = [reference.vocab[CHARACTER[byte]] for byte in (0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC3, 0xE0, 0xE2,
                                                                      0xED, 0xF0, 0xF4, 0xF5, 0xFF)]
            check_decoding(probe, reference, [rng.choice(alphabet) for _ in range(12)], what)
        for word, id in [("<|end|>", reference.added["<|end|>"]), ("A", reference.vocab["A"]), ("no such word", None)]:
            check(probe.ask({"id_of": word.encode().hex()})["id"] == id, f"{what}: id of {word!r}")
    print(f"{what}: {len(used)} tokens of {len(reference.vocab) + len(reference.added)} seen in texts")


def check_bad_text(binary, root):
    description = describe("gpt2", [("a", "b")], False, random.Random(1))
    (root / "tokenizer.json").write_text(json.dumps(description))
    with Probe(binary, root, largest_id(description) + 1) as probe:
        for bad in [b"\x80", b"\xc0\xaf", b"\xc3", b"\xe0\x80\x80", b"\xe2\x82", b"\xed\xa0\x80", b"\xf0\x80\x80\x80",
                    b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xff", b"\xc3(", b"\xf0\x9f\x98"]:
            for before, after in [(b"", b""), ("é ".encode(), b" x")]:
                error = probe.encode(before + bad + after).get("error", "")
                check("not UTF-8" in error and f"offset {len(before)} " in error, f"text {bad!r} after {before!r}: {error!r}")
    del description["model"]["vocab"][CHARACTER[ord("z")]]
    (root / "tokenizer.json").write_text(json.dumps(description))
    with Probe(binary, root, largest_id(description) + 1) as probe:
        check("'z'" in probe.encode(b"lazy").get("error", ""), "a byte that the vocab lacks")
        check("ids" in probe.encode(b"lay"), "a text without that byte")


def check_long_texts(binary, root):
    """A word of a million letters, and as many blanks and digits, take about as long as many short ones."""
    merges = [("a" * 2**n, "a" * 2**n) for n in range(10)] + [("b", "a"), ("1", "1")]
    description = describe("llama3", merges, True, random.Random(2))
    (root / "tokenizer.json").write_text(json.dumps(description))
    vocab, begin = description["model"]["vocab"], description["added_tokens"][0]["id"]
    count = 10**6
    with Probe(binary, root, largest_id(description) + 1) as probe:
        started = time.monotonic()
        ids = probe.encode(b"a" * count)["ids"]
        rest = [n for n in range(9, -1, -1) if count >> n & 1]
        check(ids == [begin] + [vocab["a" * 1024]] * (count // 1024) + [vocab["a" * 2**n] for n in rest], "a long word")
        ids = probe.encode(b"ba" * (count // 2))["ids"]
        check(ids == [begin] + [vocab["ba"]] * (count // 2), "a long word of twos")
        ids = probe.encode(b" " * count + b"x")["ids"]
        check(ids == [begin] + [vocab["Ġ"]] * count + [vocab["x"]], "many blanks")
        ids = probe.encode(b"1" * count)["ids"]
        check(ids == [begin] + [vocab["11"], vocab["1"]] * (count // 3) + [vocab["1"]], "many digits")
        ids = probe.encode(b"<|end|" * (count // 6))["ids"]
        check(ids == [begin] + [vocab[c] for c in "<|end|"] * (count // 6), "many beginnings of added tokens")
        seconds = time.monotonic() - started
    check(seconds < 120, f"long texts took {seconds:.0f} s")
    print(f"long texts: {seconds:.1f} s")


def check_refusals(binary, root):
    """Each file differs from a good one in one point and must be refused in one sentence that names it."""
    rng = random.Random(3)
    good = describe("qwen2", [("a", "b"), ("ab", "c")], False, rng)
    size = largest_id(good) + 1

    def run(text):
        (root / "tokenizer.json").write_text(text)
        return subprocess.run([binary, root, str(size)], input="", capture_output=True, text=True, timeout=60)

    def refused(what, text, word):
        result = run(text)
        check(result.returncode == 2, f"{what}: exit code {result.returncode}")
        check(result.stderr.count("\n") == 1 and word in result.stderr, f"{what}: said {result.stderr.strip()!r}")

    check(run(json.dumps(good)).returncode == 0, "the good file is refused")
    model, steps = good["model"], good["pre_tokenizer"]["pretokenizers"]
    bpe = lambda **change: {"model": {**model, **change}}
    split = lambda **change: {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**steps[0], **change}, steps[1]]}}
    added = lambda **change: {"added_tokens": [{**good["added_tokens"][0], **change}]}
    pattern = lambda text: split(pattern={"Regex": text})
    template = lambda single, **special: {"post_processor": {"type": "TemplateProcessing", "single": single, "special_tokens": {
        "x": {"ids": special.get("ids", [0])}}}}
    text_place, special_place = {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "x"}}
    for change, word in [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}}, "Sequence"),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "Metaspace"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "add_prefix_space"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}}, "pretokenizers"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps[:1]}}, "Split"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps[1:] * 2}}, "ByteLevel"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Punctuation"}, steps[1]]}}, "Punctuation"),
        (split(behavior="MergedWithPrevious"), "MergedWithPrevious"),
        (split(invert=True), "invert"),
        (split(pattern={"String": " "}), "Regex"),
        (pattern("a++"), "'++'"),
        (pattern("a*?"), "'*?'"),
        (pattern("(?<=a)b"), "'(?'"),
        (pattern("^a"), "'^'"),
        (pattern("a.b"), "'.'"),
        (pattern("a$"), "'$'"),
        (pattern(r"\bfoo"), r"'\b'"),
        (pattern(r"\d"), r"'\d'"),
        (pattern(r"\p{Greek}"), "Gr"),
        (pattern("[a[b]]"), "'[a'"),
        (pattern("[a&&b]"), "'[a'"),
        (pattern("[]a]"), "'['"),
        (pattern("a{,3}"), "'{'"),
        (pattern("a{1,99999}"), "'{1,99999'"),
        (pattern("(a"), "regular expression"),
        (pattern("[a"), "'[a'"),
        (pattern("a\\"), "'\\'"),
        ({"post_processor": {"type": "BertProcessing"}}, "BertProcessing"),
        (template([special_place]), "no place"),
        (template([text_place, text_place]), "two places"),
        (template([{"SpecialToken": {"id": "y"}}, text_place]), "has no 'y'"),
        (template([special_place, text_place], ids=[10**6]), "ids"),
        (template([special_place, text_place], ids=["x"]), "ids"),
        ({"decoder": {"type": "Metaspace"}}, "Metaspace"),
        ({"truncation": {"max_length": 5}}, "truncation"),
        ({"padding": {"length": 5}}, "padding"),
        ({"model": None}, "model"),
        (bpe(type="Unigram"), "Unigram"),
        (bpe(type="WordPiece"), "WordPiece"),
        (bpe(dropout=0.1), "dropout"),
        (bpe(byte_fallback=True), "byte_fallback"),
        (bpe(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (bpe(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (bpe(vocab=None), "vocab"),
        (bpe(vocab=["a"]), "vocab"),
        (bpe(vocab={**model["vocab"], "ab": size}), "vocab_size"),
        (bpe(vocab={**model["vocab"], "ab": 10**30}), "vocab_size"),
        (bpe(vocab={**model["vocab"], "ab": -1}), "vocab_size"),
        (bpe(vocab={**model["vocab"], "ab": "1"}), "vocab_size"),
        (bpe(vocab={**model["vocab"], "ab": model["vocab"]["a"]}), "share the id"),
        (bpe(merges=None), "merges"),
        (bpe(merges={"a": "b"}), "merges"),
        (bpe(merges=["ab"]), "not a pair"),
        (bpe(merges=["a b c"]), "not a pair"),
        (bpe(merges=[["a"]]), "not a pair"),
        (bpe(merges=[["a", 1]]), "not a pair"),
        (bpe(merges=[5]), "not a pair"),
        (bpe(merges=["a q"]), "'aq'"),
        (bpe(merges=["aq b"]), "'aq'"),
        (bpe(merges=[" b"]), "''"),
        (bpe(merges=["a b", ["a", "b"]]), "twice"),
        ({"added_tokens": {}}, "added_tokens"),
        ({"added_tokens": ["x"]}, "added_tokens"),
        (added(content=None), "content"),
        (added(content=""), "0 bytes"),
        (added(content="x" * 1025), "1025 bytes"),
        (added(id=None), "has no id"),
        (added(id=size), "vocab_size"),
        (added(id=model["vocab"]["a"]), "of the word 'a'"),
        (added(lstrip=True), "lstrip"),
        (added(rstrip=True), "rstrip"),
        (added(single_word=True), "single_word"),
        ({"added_tokens": [good["added_tokens"][0], {**good["added_tokens"][1], "id": good["added_tokens"][0]["id"]}]},
         "share the id"),
        ({"added_tokens": [good["added_tokens"][0], {**good["added_tokens"][0], "id": good["added_tokens"][1]["id"]}]},
         "two ids"),
    ]:
        refused(f"tokenizer {change}"[:120], json.dumps({**good, **change}), word)
    for text, word in [("", "JSON"), ("[]", "object"), ("[" * 10**5, "nested"), ('{"model":1,"model":2}', "twice"),
                       (json.dumps(good)[:-5], "JSON")]:
        refused(f"tokenizer {text[:20]!r}", text, word)

    # What looks odd but says nothing else is read.
    for change in [bpe(dropout=0.0), bpe(unk_token="<unk>"), {"decoder": None}, {"post_processor": None}, {"added_tokens": None},
                   {"model": {key: value for key, value in model.items() if key != "type"}}, pattern(r"[\-\[\]a-c]+|\#|\p{Ll}")]:
        check(run(json.dumps({**good, **change})).returncode == 0, f"tokenizer {change} is refused"[:120])

    # A pattern that would run for ages is given up.
    (root / "tokenizer.json").write_text(json.dumps({**good, **pattern("(a+)+b")}))
    with Probe(binary, root, size) as probe:
        check("pattern" in probe.encode(b"a" * 60).get("error", ""), "a pattern of exponential time")
        check("ids" in probe.encode(b"aab"), "the same pattern on a short text")
    print("refusals: checked")


def main():
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    binary = str(pathlib.Path(sys.argv[1]).resolve())
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        for number, kind in enumerate(("gpt2", "llama3", "qwen2", "cased", "digits")):
            for order in ("learned", "shuffled"):
                check_kind(binary, root, kind, order, (number + (order == "learned")) % 2 == 0)
        check_bad_text(binary, root)
        check_long_texts(binary, root)
        check_refusals(binary, root)
    print("all checks passed" if not failures else f"{len(failures)} checks failed")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
