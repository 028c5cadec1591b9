#!/usr/bin/env python3
"""Token ids of hard strings, by llama.cpp, checked against Hugging Face's `tokenizers`.

    pip install llama-cpp-python==0.3.36 tokenizers==0.22.2 gguf
    scripts/fetch-vocabs.sh && python scripts/goldens/tokens.py MODELS_DIR

MODELS_DIR holds the two demo models; the other vocabularies are in models/vocabs. Writes
engine/tests/goldens/tokens.json: the strings once, and per vocabulary
  plain    ids of each string, control tokens written out being text
  special  {string index: ids} where parsing special tokens gives other ids
  added    ids of the first string with BOS and EOS as the model wants them
  eog      the ids that end a generation, without those that are ordinary text (Qwen's "</s>")
  pieces   FNV-1a (64 bits) over every token's bytes, each behind its length as 4 little-endian bytes
  hf       {string index: ids} where Hugging Face's tokenizer differs from llama.cpp (plain)
"""

import ctypes
import json
import pathlib
import sys

import gguf
import llama_cpp
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

ROOT = pathlib.Path(__file__).resolve().parents[2]
VOCABS = {
    "smollm2": "smollm2-135m-instruct-q4_1.gguf",
    "qwen2.5-coder": "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    "llama-bpe": None,
    "gpt-2": None,
    "llama-spm": None,
    "phi-3": None,
}

CODE = '''fn main() {
    let x: Vec<u8> = (0..10).map(|i| i * 2).collect();
\tprintln!("{:?}", x);  // tab above

}
'''
PYTHON = '''def f(a, *, b=None):
    """Doc\\n"""
    if a != b and not (a >= 3):
        return {"k": [1, 2.5e-10, 0xFF, 1_000_000]}


class A: pass
'''

STRINGS = [
    "Hello, world!", "", " ", "  ", "   ", "    ", "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", "\r\n\r\n", "\r", "\n ",
    " \n", " \n ", "  \n  \n", "\n \n \n", "\t\n", "\n\t", " \t \t", "a ", " a", "  a", "   a", "a  b", "a   b",
    "a\tb", "a\t\tb", "a\nb", "a\n\nb", "a \n b", "a  \n\n  b", "a\r\nb", "a\n\n\n   b", "x" * 50, "a" * 200, " " * 100,
    "\n" * 70, "ab " * 30, "!" * 33, "=" * 80, "-" * 41 + "\n", ". . . .", "...", "....", "…", "--", "—", "a—b", "--a",
    # Digits.
    "0", "12", "123", "1234", "12345", "123456789012345", "3.14159", "1,234,567.89", "1e-9", "0x1F", "007", "a1b22c333d4444",
    " 1", " 12 123 1234", "1 2 3", "½", "²³", "x²", "٣٤٥٦", "१२३४", "Ⅳ Ⅻ", "①②③", "１２３", "2024-07-05T12:34:56Z",
    "+1 (555) 123-4567", "192.168.0.1:8080", "100%", "$5.00", "€20", "1st 2nd 3rd", "v1.2.3-rc4",
    # Contractions.
    "I'm you're he's we've they'll I'd don't", "I'M YOU'RE HE'S WE'VE THEY'LL I'D DON'T", "It's'", "'s", "'S", "''s", "' s",
    "rock'n'roll", "o'clock", "'tis", "d'accord l'été", "I’m don’t", "'llama", "'LLama", "we'RE", "'Ve", "1's", "A's B'S",
    # Scripts.
    "Ça va? Déjà vu — naïve façade", "Größe straße ÄÖÜ", "Привет, мир!", "Γειά σου Κόσμε", "שלום עולם", "مرحبا بالعالم",
    "السَّلامُ عَلَيْكُمْ", "नमस्ते दुनिया", "สวัสดีชาวโลก", "你好，世界！", "今天天气真好。我们去公园吧", "こんにちは世界", "カタカナ ひらがな 漢字",
    "안녕하세요 세계", "ㄱㄴㄷ", "Tiếng Việt có dấu", "ქართული", "Հայերեն", "ትግርኛ", "བོད་སྐད", "𠮷野家", "𝒳𝓎𝓏 𝔸𝔹", "ﬁ ﬂ ﬃ",
    "abc שלום 123 مرحبا def", "\u202eabc\u202c", "\u200fאב\u200e", "e\u0301", "\u0301", " \u0301", "a\u0308\u0323", "\u0e31", "Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤̞͉͚̯̞̠͍A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G",
    # Emoji.
    "😀", "😀😀😀", " 😀", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "👍🏽", "❤️", "☺", "🤷🏼‍♀️", "1️⃣", "🧑🏿‍🚀 to the 🌕!", "a😀b", "🦙.cpp", "🫠🫡🪿",
    # Symbols.
    "α+β=γ", "∑_{i=0}^n x_i", "a→b←c", "≤≥≠≈", "™®©", "¿Qué? ¡Sí!", "«quote»", "“smart” ‘quotes’", "`code`", "~/.bashrc",
    "#hashtag @user", "a_b_c __init__", "C++ C# F#", "a&b && c||d", "<html lang=\"en\">", "&amp;&lt;", "\\n \\t \\u0041", "[x](http://a.b/c?d=e&f=g#h)",
    "^_^ :-) ;) <3", "{}{}[]()", "({[<>]})", "///", "\\\\", "\"\"\"", "'''", "***bold***", "# Title\n\n- item\n  - nested\n\n1. one",
    "| a | b |\n|---|---|", "$$\\frac{1}{2}$$", "a;b;c", "!?!?", "¯\\_(ツ)_/¯", "%s %d %%", "\"quoted\\\"", "=>", "->", "::", "!=", "===",
    # Code.
    CODE, PYTHON, "for(int i=0;i<n;++i){a[i]+=b[i];}", "SELECT * FROM t WHERE x='y';", "{\"a\": [1, null, true], \"b\": {\"c\": \"d\\u00e9\"}}",
    "if x:\n\tpass\nelse:\n\treturn\n", "    def f():\n        pass", "camelCaseWord snake_case_word SCREAMING_CASE kebab-case", "getHTTPResponseCode404", "<div>\n  <p>Hi</p>\n</div>",
    # White space of other kinds, invisible and odd characters.
    "\u00a0", "a\u00a0b", "a\u3000b", "\u2003x", "a\u2028b\u2029c", "\u200b", "a\u200bb", "\u200d", "\ufeff", "\ufeffBOM", "\ufffd", "a\ufffdb", "\ufffd\ufffd",
    "\ue000", "\uf8ff", "\U000f0000", "\uffff", "\U0010ffff", "\U0001fbf0", "\u00ad", "soft\u00adhyphen", "\x7f", "\x85", "a\x0bb\x0cc", "\x1b[31mred\x1b[0m", "\x01\x02",
    # Words.
    "supercalifragilisticexpialidocious", "Donaudampfschifffahrtsgesellschaftskapitän", "antidisestablishmentarianism " * 3,
    "THE QUICK BROWN FOX", "tHe QuIcK", "the the the", "Lorem ipsum dolor sit amet, consectetur adipiscing elit.", "www.example.com/päth?q=1", "foo@bar.com", "  leading and trailing  ",
    "Once upon a time, in a land far, far away…", "\n\nHuman: hi\n\nAssistant:", "A.B.C. U.S.A. e.g. i.e.", "x" * 33 + " " + "y" * 33, "ÀÉÎõü", "ŁódźŻółć",
    # Special tokens as text.
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>", "a<|endoftext|>b", " <|im_end|> ", "<|im_start|><|im_end|>", "<|im_start", "<|", "|>",
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>", "<|end_of_text|>", "<|eot_id|>x", "<|reserved_special_token_0|>", "<s>", "</s>", "<s>a</s>b", "<unk>",
    "a <s> b", "[INST] hi [/INST]", "<<SYS>>", "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "<repo_name>x<filename>y", "<tool_call>\n{}\n</tool_call>", "<|vision_start|>",
    "<0x0A>", "<0xFF>", "<|user|>hi<|end|><|assistant|>", "<|im_sep|>", "[PAD151665]", "<file_sep>", "<|file_sep|>\n", "<think>\n\n</think>",
    # Mixed.
    "Price: $1,299.99 (≈ €1.200) – 10% off!", "日本語とEnglishの混在text123", "mixed\ttabs and  spaces\n\n\tindent", "Ünïcödé—dash…ellipsis", "a1😀\n\n😀 2b", "１．全角 ｆｕｌｌ", "x=1;y=2\r\n\r\nz=3",
    "“What’s up?” she asked… — ‘nothing’", "café\u0301 résumé", "test\x00null", "𝟘𝟙𝟚", "ſ's 'ſ K", "İstanbul ıI", "ǅ ǆ Ǆ", "ª º", "ー〜～", "0\u0660\u06f0\u0966",
    "ab\u0f0bcd", "ᚠᛇᚻ", "🜁🜂", "〇零一二", "\u1680x\u180ey", "a\u2009\u200ab", "  \u3000  x", "\u2581", "a\u2581b", " ▁ x",
]


def fnv1a(chunks):
    value = 0xCBF29CE484222325
    for chunk in chunks:
        for byte in len(chunk).to_bytes(4, "little") + chunk:
            value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


class Vocab:
    """A vocabulary in llama.cpp."""

    def __init__(self, path):
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.size = llama_cpp.llama_vocab_n_tokens(self.vocab)

    def encode(self, text, add_special, parse_special):
        data = text.encode()
        room = (llama_cpp.llama_token * (len(data) * 2 + 8))()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), room, len(room), add_special, parse_special)
        assert n >= 0
        return list(room[:n])

    def piece(self, token):
        room = ctypes.create_string_buffer(4096)
        n = llama_cpp.llama_token_to_piece(self.vocab, token, room, len(room), 0, True)
        assert n >= 0
        return room.raw[:n]

    def eog(self):
        return [t for t in range(self.size) if llama_cpp.llama_vocab_is_eog(self.vocab, t)]


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
          r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def hugging_face(path):
    """The same vocabulary in Hugging Face's tokenizers, as the families' tokenizer.json files have it."""
    fields = gguf.GGUFReader(path).fields
    get = lambda key: fields["tokenizer.ggml." + key].contents()
    tokens, types = get("tokens"), get("token_type")
    vocab = {t: i for i, t in enumerate(tokens)}
    if get("model") == "gpt2":
        pre = get("pre")
        merges = [tuple(m.split(" ")) for m in get("merges")]
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
        level = lambda regex: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
        split = lambda pattern: pre_tokenizers.Split(Regex(pattern), "isolated")
        tokenizer.pre_tokenizer = {
            "gpt-2": lambda: level(True),
            "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), level(True)]),
            "qwen2": lambda: pre_tokenizers.Sequence([split(LLAMA3.replace("{1,3}", "")), level(False)]),
            "llama-bpe": lambda: pre_tokenizers.Sequence([split(LLAMA3), level(False)]),
        }[pre]()
    else:
        # SentencePiece's BPE by score, as transformers converts it: every way to make a piece out of two.
        scores = get("scores")
        merges = [(scores[vocab[t]], t[:i], t[i:]) for t in tokens for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
        merges.sort(key=lambda m: (-m[0], vocab[m[1]], vocab[m[2]]))
        tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[(a, b) for _, a, b in merges], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        tokenizer.normalizer = tokenizers.normalizers.Sequence([tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")])
    # Only user-defined tokens are cut out of plain text.
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, k in zip(tokens, types) if k == 4])
    return tokenizer


def golden(path):
    vocab, other = Vocab(path), hugging_face(path)
    types = gguf.GGUFReader(path).fields["tokenizer.ggml.token_type"].contents()
    ends = vocab.eog()
    # llama.cpp takes every "</s>" for a control token; in Qwen's vocabulary it is a piece of HTML.
    ordinary = {t for t in ends if types[t] == 1}
    plain = [vocab.encode(s, False, False) for s in STRINGS]
    special = [vocab.encode(s, False, True) for s in STRINGS]
    hf = [other.encode(s, add_special_tokens=False).ids for s in STRINGS]
    return {
        "plain": plain,
        "special": {i: b for i, (a, b) in enumerate(zip(plain, special)) if a != b and not ordinary & set(b)},
        "hf": {i: b for i, (a, b) in enumerate(zip(plain, hf)) if a != b},
        "added": vocab.encode(STRINGS[0], True, False),
        "eog": [t for t in ends if t not in ordinary],
        "pieces": fnv1a(vocab.piece(t) for t in range(vocab.size)),
    }


def main():
    demos = pathlib.Path(sys.argv[1])
    out = {}
    for name, file in VOCABS.items():
        path = demos / file if file else ROOT / "models/vocabs" / f"ggml-vocab-{name}.gguf"
        out[name] = golden(path)
        differing = [STRINGS[int(i)] for i in out[name]["hf"]]
        print(f"{name}: {len(STRINGS)} strings, Hugging Face differs on {differing}", file=sys.stderr)
    dump = lambda value: json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    lines = ['{"strings":[', ",\n".join(dump(s) for s in STRINGS), '],"vocabularies":{']
    parts = [f'"{name}":' + "{" + ",\n".join(f'"{k}":{dump(v)}' for k, v in entry.items()) + "}" for name, entry in out.items()]
    text = "\n".join(lines) + "\n" + ",\n".join(parts) + "}}\n"
    json.loads(text)
    (ROOT / "engine/tests/goldens/tokens.json").write_text(text)


main()
