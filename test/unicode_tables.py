#!/usr/bin/env python3
"""Writes the Unicode tables at the end of qlora.c to stdout.

    python3 test/unicode_tables.py > tables.c

Needs nothing but Python's own `unicodedata`. The tables in the repository were made with Unicode
16, the version of Oniguruma inside `tokenizers` 0.22: use Python 3.14, or an older one with the
package unicodedata2==16.0.0. The normal form inside `tokenizers` is that of Unicode 9; what is
newer is left out of its tables, because ids must be the same.

A table is a list of numbers. A number is written in base 26, its digits upper-case letters, the
last one a lower-case letter; what can be negative is stored as 2n or -2n-1. No number crosses a
line.
"""
import sys

try:
    import unicodedata2 as unicode
except ImportError:
    import unicodedata as unicode

LIMIT = 0x110000
CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp "
              "Cc Cf Cs Co Cn").split()

# Marks and canonical decompositions of Unicode 16 that Unicode 9 does not have: ranges of codes.
NEWER_THAN_UNICODE_9 = """
    7FD 897-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1ACE 1DF6-1DFA A82C 105C9 105E4 10D24-10D27
    10D69-10D6D 10EAB-10EAC 10EFD-10EFF 10F46-10F50 10F82-10F85 11070 1133B 11383 11385 1138E
    11391 113C5 113C7-113C8 113CE-113D0 1145E 11839-1183A 11938 1193D-1193E 11943 119E0 11A34
    11A47 11A99 11D42 11D44-11D45 11D97 11F41-11F42 16121-16128 1612F 16D68-16D6A 16FF0-16FF1
    1E08F 1E130-1E136 1E2AE 1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF"""
# The same of compatibility decompositions, which may also rest on a newer canonical one.
NEWER_COMPATIBLE = """
    32FF A7F2-A7F4 AB69 10781-10785 10787-107B0 107B2-107BA 1CCD6-1CCF9 1E030-1E06D 1F16C
    1FBF0-1FBF9"""


def codes(spans):
    for span in spans.split():
        first, _, last = span.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


NEWER = set(codes(NEWER_THAN_UNICODE_9))
NEWER_COMPATIBLE = set(codes(NEWER_COMPATIBLE))


def number(n):
    text = chr(ord("a") + n % 26)
    while n >= 26:
        n //= 26
        text = chr(ord("A") + n % 26) + text
    return text


def signed(n):
    return number(2 * n if n >= 0 else -2 * n - 1)


def runs(value):
    """Runs from code 0 on: value, length."""
    start = 0
    for code in range(1, LIMIT + 1):
        if code == LIMIT or value(code) != value(start):
            yield number(value(start)) + number(code - start)
            start = code


def category(code):
    return CATEGORIES.index(unicode.category(chr(code)))


def decomposition(code):
    """The canonical decomposition: one or two characters, or none."""
    text = "" if code in NEWER else unicode.decomposition(chr(code))
    return [int(part, 16) for part in text.split()] if text[:1] != "<" else []


def composes(code):
    return unicode.normalize("NFC", chr(code)) == chr(code)


CARE = 255
SECOND = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))     # Korean vowels, final consonants
CHANGED = set()
for letter in range(LIMIT):
    if decomposition(letter):
        if composes(letter):
            SECOND.add(decomposition(letter)[-1])
        else:
            CHANGED.add(letter)


def nfc_class(code):
    """The canonical combining class, or CARE: class 0, but changed or able to unite."""
    value = 0 if code in NEWER else unicode.combining(chr(code))
    return value or (CARE if code in SECOND or code in CHANGED else 0)


def canonical_table():
    """Codes left out, kind (0 one character, 1 a pair, 2 a pair that is never composed again),
    and the characters, each as its distance to the one in the same place before."""
    end, last = 0, [0, 0]
    for code in range(LIMIT):
        parts = decomposition(code)
        if not parts:
            continue
        kind = 0 if len(parts) == 1 else 1 if composes(code) else 2
        text = number(code - end) + number(kind)
        for place, part in zip((0, 1) if kind else (1,), parts):
            text += signed(part - last[place])
            last[place] = part
        end = code + 1
        yield text


def compatible_table():
    """Codes left out, how many characters, each as its distance to the one before it."""
    end, last = 0, 0
    for code in range(LIMIT):
        text = "" if code in NEWER_COMPATIBLE else unicode.decomposition(chr(code))
        if text[:1] != "<":
            continue
        parts = [int(part, 16) for part in text.split()[1:]]
        entry = number(code - end) + number(len(parts))
        for part in parts:
            entry += signed(part - last)
            last = part
        end = code + 1
        yield entry


def write_table(name, comment, entries):
    for line in comment:
        print("// " + line)
    print(f"static const char *const {name}[] = {{")
    line = ""
    for entry in list(entries) + [None]:
        if entry is None or len(line) + len(entry) > 92:
            print(f'    "{line}",')
            line = ""
        line += entry or ""
    print("    NULL\n};\n")


def main():
    sys.stdout.reconfigure(encoding="utf-8")
    bar = "// " + "=" * 97
    print(f"""{bar}
//  Generated tables: Unicode {unicode.unidata_version}
//
//  Written by test/unicode_tables.py; do not edit. A number is in base 26, its digits upper-case
//  letters, the last one a lower-case letter; what can be negative is stored as 2n or -2n-1.
{bar}
""")
    write_table("unicode_categories", [
        "Runs from U+0000 on: general category (in the order of enum Category), length."],
        runs(category))
    write_table("unicode_classes", [
        "Runs of canonical combining classes (Unicode 9) or NFC_CARE: class, length."],
        runs(nfc_class))
    write_table("unicode_canonical", [
        "Canonical decompositions (Unicode 9): codes left out; 0 for one character, 1 for a pair, 2",
        "for a pair that is never composed again; each character as signed distance to the last one",
        "in its place (a single one stands in the second)."],
        canonical_table())
    write_table("unicode_compatible", [
        "Compatibility decompositions (Unicode 9): codes left out; how many characters; each as signed",
        "distance to the last one."],
        compatible_table())
    print("""static const char *const *unicode_table(UnicodeTable which) {
    static const char *const *const tables[] = {
        unicode_categories, unicode_classes, unicode_canonical, unicode_compatible};
    return tables[which];
}""")


if __name__ == "__main__":
    main()
