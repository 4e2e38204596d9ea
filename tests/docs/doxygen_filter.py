#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Shows Doxygen the library's comments as it understands them; line numbers stay as they are.

    doxygen_filter.py FILE        writes the filtered file to stdout

The headers are written for people who read them in an editor. A header begins with `//` lines that say what it is, a
policy's with its paper, costs and departures; sections begin with `// --- name ---`; a policy's verbs and traits are
explained once, in policy/policy.hpp, and carry no comment. The filter hands all this on:

- the comment at the head of a file becomes that of the file, or of the policy that the file is about;
- a policy's verbs and traits without a comment, and the concepts, get what the contract's tables say;
- `using Base::member;` of a private base shows that member, and the verbs of AnyCache those of PagedKvCache;
- a policy's state is hidden, since the container alone keeps it, and so are the iterators of a range;
- copies, moves, destructors, comparisons and allocation without a comment are hidden: they do what they do everywhere;
- an overload without a comment shares that of the one before it;
- sections become groups of members, and arXiv numbers become links.
"""
import pathlib
import re
import sys

CONTRACT = '\\ref policy.hpp "policy contract"'
OPTION_PARTS = "visit problem preset presets names_of".split()
OPTIONS = {"pin_prompt": "Pages that hold a token of the prompt are never given up.",
           "seed": "Of the random numbers."}

DECLARATION = re.compile(r"\b([a-z_]\w*)\s*(?:\(|=|\{|;)")
SPECIAL = re.compile(r"^\s+(?:explicit |constexpr |~)*(\w+)\((?:const )?(\w+)(?:<[^()]*>)?&?&? ?\w*\)|^\s+~\w+\(\)"
                     r"|.*\boperator(?:=|==|<=>| new| delete)\(")
NOTE = re.compile(r"^\s*///|^\s*// ---")


def linked(text):
    return re.sub(r"\b(\d{4}\.\d{5})\b", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', text)


def prose(text):
    """A line of a plain comment: nothing in it is a command or a tag."""
    text = re.sub(r"([\\@<>#&%])", r"\\\1", text)
    parts = r"(?<=\. )\s?(Source|Needs|Per step|Memory|Departs(?: from the papers?)?|Costs|Limits):"
    return linked(re.sub(r"^(Source|Needs|Per step|Memory|Costs|Limits):|" + parts,
                         lambda found: "<br>**" + found.group(0).strip()[:-1] + ":**", text))


def head_comment(lines):
    """The text between the licence and `#pragma once`; what is indented in it stays as it is."""
    filtered, verbatim = [], False
    for line in lines:
        text = line[3:] if line.startswith("// ") else line[2:]
        if text.startswith("clang-format"):
            text = ""
        indented = text.startswith("  ") or (verbatim and text == "")
        if indented != verbatim:
            filtered[-1:] = [(filtered[-1] if filtered else "") + (" \\verbatim" if indented else " \\endverbatim")]
        verbatim = indented
        filtered.append(text if indented else prose(text))
    return filtered[:-1] + [filtered[-1] + (" \\endverbatim */" if verbatim else " */")]


def end_of_declaration(lines, first):
    """The line on which the declaration or definition that begins on `first` ends."""
    depth = 0
    for at in range(first, len(lines)):
        code = lines[at].split("//")[0].rstrip()
        depth += sum(code.count(c) for c in "({") - sum(code.count(c) for c in ")}")
        if depth == 0 and code.endswith((";", "}")):
            return at
    return first


def is_special_member(line):
    found = SPECIAL.match(line)
    is_special = found and (found.group(1) is None or found.group(1) == found.group(2))
    return is_special and not line.lstrip().startswith(("//", "return"))


def hide(lines, is_hidden, even_if_explained=False):
    at = 0
    while at < len(lines):
        if is_hidden(lines[at]) and (even_if_explained or not NOTE.match(lines[at - 1])):
            last = end_of_declaration(lines, at)
            first = at
            while NOTE.match(lines[first - 1]):
                first -= 1
            lines[first] = "/** \\cond */ " + lines[first]
            lines[last] += " /** \\endcond */"
            at = last
        at += 1


def share_comments(lines):
    """An overload without a comment gets that of the one before it."""
    comment, name, indent = "", "", ""
    for at, line in enumerate(lines):
        if re.match(r"\s*///(?!<)", line):
            comment = (comment + "\n" if re.match(r"\s*///(?!<)", lines[at - 1]) else "") + line.strip()[3:]
            indent = re.match(r"\s*", line).group(0)
            name = ""
            continue
        if not line.startswith(indent) or line[len(indent):len(indent) + 1] in (" ", "}", ")", "#", "/", ""):
            continue
        if line.startswith("concept "):
            name = "\n"
        found = re.search(r"(operator\S+|\b[a-z]\w*)\(", re.sub(r"^\s*requires\(.*|noexcept\(", "", line))
        if not found:
            continue
        if not name:
            name = found.group(1)
        elif found.group(1) == name and "///" not in line and not NOTE.match(lines[at - 1]):
            first = at - 1 if lines[at - 1].lstrip().startswith("template <") else at
            if not NOTE.match(lines[first - 1]):
                lines[first] = "/** " + comment.replace("\n", " ") + " */ " + lines[first]
        elif found.group(1) != name:
            name = "\n"


def documented(path):
    """Of the functions and members of a header: name, comment, declaration, in order."""
    comment, at, found = [], 0, []
    lines = path.read_text().splitlines()
    while at < len(lines):
        line = lines[at]
        at += 1
        if re.match(r"\s*///(?!<)", line):
            comment.append(line.strip()[3:].strip())
            continue
        if not re.match(r" {0,2}[^\W\d]", line) or line.lstrip().startswith("using "):
            comment = []
            continue
        declaration = line.strip()
        while at < len(lines) and not re.search(r"[{;}]$", re.sub(r"\s*//.*", "", lines[at - 1])):
            declaration += " " + lines[at].strip()
            at += 1
        trailing = re.search(r"///<(.*)$", declaration)
        declaration = re.sub(r"\s*///.*", "", declaration)
        head = re.match(r"(.*?\)(?: const)?(?: noexcept(?:\(.*?>\))?)?)(?: requires.*?)? (?:\{|:)", declaration)
        name = re.search(r"\b(\w+)\(", re.sub(r"noexcept\(|requires\(", "", declaration))
        if head and name:
            text = " ".join(comment) or (trailing.group(1).strip() if trailing else "")
            found.append((name.group(1), text, head.group(1)))
        comment = []
    return found


def show_what_is_taken_over(lines, folder):
    """`using Base::member;` of a private base becomes the member, as it is declared and explained there."""
    bases = [folder / f"layer_{base}.hpp" for base in ("drafts", "pages", "heads")]
    inherited = [[member for member in documented(base) if member[1]] for base in bases]
    at = 0
    while at < len(lines):
        first = at
        if not re.match(r"  using Pages::", lines[at]):
            at += 1
            continue
        statement = lines[at]
        while ";" not in statement:
            at += 1
            statement += lines[at]
            lines[at] = ""
        at += 1
        shown = ""
        for name in re.findall(r"Pages::(\w+)", statement):
            own = NOTE.match(lines[first - 1])
            told = [found for base in inherited if (found := [m for m in base if m[0] == name])]
            members = next((found for found in told if not found[0][1].startswith("As Layer")), [])
            shown += " ".join(("" if own else f"/** {comment} */ ") + f"{declaration};"
                              for _, comment, declaration in members) + " "
        lines[first] = "  " + shown


def refer_to_the_original(lines, folder):
    """A verb of AnyCache without a comment has that of PagedKvCache's, or of the function it stands for."""
    originals = {}
    for header in ("layer_heads.hpp", "layer_pages.hpp", "layer_drafts.hpp", "paged_kv_cache.hpp", "attend.hpp"):
        for name, comment, declaration in documented(folder / header):
            rows = re.search(r"HeadRows|TokenRows|std::span", declaration)
            key = (name, rows.group(0) if rows else "", "Executor" in declaration)
            if comment:
                originals.setdefault(key, comment) if name == "attend" else originals.update({key: comment})
    first = next(at for at, line in enumerate(lines) if line.startswith("class AnyCache"))
    for at in range(first, next(at for at in range(first, len(lines)) if lines[at] == " private:")):
        found = re.match(r"  (?:\S+ )*?(\w+)\((?!\.)", lines[at])
        if not found or NOTE.match(lines[at - 1]) or "///" in lines[at]:
            continue
        declaration = lines[at] + lines[at + 1]
        rows = re.search(r"HeadRows|TokenRows|std::span", lines[at])
        key = (found.group(1), rows.group(0) if rows else "", "E&& executor" in declaration)
        if key in originals:
            above = at - 1 if lines[at - 1].lstrip().startswith("template <") else at
            lines[above] = f"/** {originals[key]} */ " + lines[above]


def group_sections(lines):
    is_open = False
    for at, line in enumerate(lines):
        section = re.match(r"\s*// --- (.*?) ---$", line)
        ends = section or re.match(r"( private:| protected:|};)", line)
        if ends and is_open:
            lines[at] = "/**@}*/ " + line
            is_open = False
        if section:
            title = section.group(1)[0].upper() + section.group(1)[1:]
            lines[at] = ("/**@}*/ " if lines[at].startswith("/**@}") else "") + f"/** @name {title} */ /**@{{*/"
            is_open = True


def contract_table(lines, heads):
    """Of a table in the contract's comment whose columns have these heads: the name in the first, and the others."""
    title = next(at for at, line in enumerate(lines) if re.match(r"//   " + r" .*\b".join(heads), line))
    starts = [lines[title].index(head) for head in heads] + [None]
    rows, name = {}, ""
    for line in lines[title + 1:]:
        if not line.startswith("//  "):
            break
        cells = [line[start:end].strip() for start, end in zip(starts, starts[1:])]
        if line[5] != " ":
            found = re.search(r"(\w+)\(", cells[0]) or re.match(r"(\w+)", cells[0])
            name = found.group(1) if found else name
        row = rows.setdefault(name, [""] * (len(heads) - 1))
        rows[name] = [re.sub(r"(\w)- (?=[a-z])", r"\1", f"{text} {cell}".strip()) for text, cell in zip(row, cells[1:])]
    return rows


def contract(folder):
    """What the contract says of each verb and each trait."""
    lines = (folder / "policy.hpp").read_text().splitlines()
    told = {}
    for name, (called, may, _) in contract_table(lines, ("verb", "called", "may", "absent")).items():
        told[name] = f"Verb, called: {prose(called)}. May {prose(may)}. Of the {CONTRACT}."
    traits = contract_table(lines, ("trait", "values: the default first", "what it is for"))
    for name, (values, purpose) in traits.items():
        told[name] = f"Trait: {prose(purpose)}. Values, the default first: {prose(values)}. Of the {CONTRACT}."
    return told


def refer_to_contract(lines, told):
    """In a policy: what the contract says of each verb, trait and part of its options that has no comment."""
    in_options = is_private = False
    for at, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if re.match(r" (private|public):|\S", line):
            is_private = line == " private:"
        if is_private:
            continue
        if re.match(r"  (struct Options \{|using Options =)", line):
            in_options = line.endswith("{")
            lines[at] = f"/** What command lines and snapshots know by name; see the {CONTRACT}. */ " + line
            continue
        if in_options and line.startswith("  }"):
            in_options = False
            lines[at] = line.replace("options;", "options;  ///< as given", 1)
            continue
        if line.startswith("  Options options;"):
            lines[at] = line + "  ///< as given"
            continue
        if indent != (4 if in_options else 2) or "///" in line or NOTE.match(lines[at - 1]):
            continue
        found = DECLARATION.search(re.sub(r"<[^()]*?>", "", line)) if not line.lstrip().startswith("//") else None
        name = found.group(1) if found else ""
        if in_options and name in OPTIONS:
            lines[at] = f"/** {OPTIONS[name]} */ " + line
        elif name in OPTION_PARTS and (in_options or name == "names_of"):
            lines[at] = f"/** Lists or checks the options, for the {CONTRACT}. */ " + line
        elif not in_options and name in told:
            lines[at] = f"/** {told[name]} */ " + line


def explain_concepts_and_traits(lines, told):
    in_traits = False
    for at, line in enumerate(lines):
        in_traits = line == "namespace traits {" or (in_traits and line != "}  // namespace traits")
        trait = re.match(r"constexpr [\w:]+ (\w+)\(", line) if in_traits else None
        if trait and not NOTE.match(lines[at - 2]):
            lines[at - 1] = f"/** {told[trait.group(1)]} */ " + lines[at - 1]
        verb = re.search(r"policy\.(\w+)\(", "".join(lines[at:at + 3])) if line.startswith("concept ") else None
        if verb and not NOTE.match(lines[at - 2]):
            lines[at - 1] = f"/** {told[verb.group(1)]} */ " + lines[at - 1]


def filtered_header(path):
    lines = path.read_text().splitlines()
    once = lines.index("#pragma once")
    is_policy = re.search(r"^  static constexpr std::string_view name\b", "\n".join(lines), re.M)
    name = ""
    if is_policy:
        for line in lines:
            name = match.group(1) if (match := re.match(r"struct (\w+) \{", line)) else name
            if re.match(r"  static constexpr std::string_view name\b", line):
                break
        refer_to_contract(lines, contract(path.parent))
        hide(lines, re.compile(r"  struct (?!Options)\w+ \{|  using LayerState\b").match, True)
    if path.name in ("paged_kv_cache.hpp", "page_steering.hpp"):
        show_what_is_taken_over(lines, path.parents[1] / "cache")
    if path.name == "policy.hpp":
        explain_concepts_and_traits(lines, contract(path.parent))
    if path.name == "policy_conformance.hpp":  # GoogleTest's macros, of which each test makes a class
        lines[next(at for at, line in enumerate(lines) if line.startswith("TYPED_TEST_SUITE_P"))] = "/** \\cond */"
        lines[-1] = "/** \\endcond */ " + lines[-1]
    if path.name == "any_cache.hpp":
        refer_to_the_original(lines, path.parent)
    hide(lines, is_special_member)
    hide(lines, lambda line: line.endswith("// for attend() alone"))
    share_comments(lines)
    hide(lines, re.compile(r"  (class Iterator|struct Range) \{").match)
    group_sections(lines)
    opening = ["", "/** \\file"]
    if name:
        opening = ["/** \\file", f"The policy kvsparse::{name}. */ /** \\struct kvsparse::{name}"]
    lines[:once + 1] = opening + head_comment(lines[1:once])
    for at in range(once + 1, len(lines)):
        if "///" in lines[at]:
            lines[at] = linked(lines[at]).replace(" .. ", " ..&nbsp;")  # else a brief description ends there
    return lines


def filtered_page(path):
    """README.md: links into the repository lead nowhere from the pages, so their text is left."""
    return [re.sub(r"(?<!!)\[([^]]*)\]\((?!http|#)[^)]*\)", r"\1", line) for line in path.read_text().splitlines()]


def main():
    path = pathlib.Path(sys.argv[1])
    try:
        print("\n".join(filtered_page(path) if path.suffix == ".md" else filtered_header(path)))
    except Exception:
        print("/** \\file\n\\the_filter_failed */")  # which Doxygen warns of; it does not look at the exit code
        raise


if __name__ == "__main__":
    main()
