"""Small tokenizers of several kinds, and random documents to encode with them."""

from functools import cache

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from byte_llama.distillation import ParallelEncoder
from byte_llama.token_bytes import token_bytes
from byte_llama.tokenization_byte_llama import byte_tokenizer_from

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Der flinke Fuchs springt über den faulen Hund.\n\nNaïve cafés: 42 €!",
    "user and assistant said: the user asked the system 😀\t\n",
]
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>", "</s>"]
PROMPT = {"role": "user", "content": "What is the quick fox?"}
ANSWER = {"role": "assistant", "content": "It jumps over the dog.\n"}


@cache
def subword_tokenizer(normalizer=None):
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer and normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, show_progress=False, special_tokens=SPECIAL, initial_alphabet=sorted(alphabet)
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@cache
def sentencepiece_tokenizer():
    """One that puts a space in front of every text, and writes what it does not know as bytes."""
    characters = sorted(set("".join(CORPUS)) - {" ", "😀"})
    tokens = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *characters, "▁t", "th", "▁th", "he"]
    merges = [("▁", "t"), ("t", "h"), ("▁t", "h"), ("h", "e")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def byte_tokenizer(template_words=()):
    return byte_tokenizer_from(subword_tokenizer(), special_tokens=SPECIAL[:2], template_words=template_words)


def spelled(tokenizer, ids):
    """The bytes of each id, special tokens as their text."""
    table = token_bytes(tokenizer)
    return [tokenizer.convert_ids_to_tokens(i).encode() if table[i] is None else table[i] for i in ids.tolist()]


TEXTS = st.lists(
    st.sampled_from(
        [*"tehxyz .,\n\t", " the", "user", "é", "e\u0301", "\u0336", "\u0323", "😀", "漢字", "<|im_end|>", "\u0958"]
    ),
    max_size=25,
)
CONTENT = TEXTS.map("".join)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": CONTENT}), max_size=4
)
DOCUMENTS = st.one_of(st.fixed_dictionaries({"text": CONTENT}), st.fixed_dictionaries({"messages": MESSAGES}))


def rendered(document):
    if "text" in document:
        return f"<s>{document['text']}</s>"
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in document["messages"]]
    return "<s>" + "".join(turns)


def examples_of(texts, **options):
    encoder = ParallelEncoder(byte_tokenizer(), subword_tokenizer(), **options)
    return encoder([{"text": text} for text in texts])
