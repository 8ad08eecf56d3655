"""Small T5 folders with random weights, as transformers writes them, and their tokenizers."""

import io
from pathlib import Path
from typing import Any

import torch

from videodiff.networks.tokenizer import declare_torchvision_ops

WIDTH = 24
CAPTIONS = [
    "a large red circle moving left on a white background",
    "A small blue square stands still, on black.",
    "the green triangle's growing slowly",
    "a red circle",
]


def transformers() -> Any:
    declare_torchvision_ops()
    import transformers

    return transformers


def write_t5(folder: Path, seed: int = 0, **settings: Any) -> Path:
    """An encoder and a decoder as Flan-T5's folders hold them, with tokenizer.json and spiece.model."""
    import sentencepiece
    import tokenizers

    folder.mkdir(parents=True)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS * 10), model_writer=written, vocab_size=60, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(written.getvalue())
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    size = pieces.get_piece_size()
    table = [(pieces.id_to_piece(n), pieces.get_score(n)) for n in range(size)]
    fast = tokenizers.Tokenizer(tokenizers.models.Unigram(table, unk_id=2))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    fast.add_special_tokens(["<pad>", "</s>", "<unk>"])
    fast.enable_padding(length=50)  # what a file may keep of its last use
    fast.enable_truncation(3)
    fast.save(str(folder / "tokenizer.json"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers().T5Config(
            vocab_size=size + 4, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=3,
            relative_attention_num_buckets=8, relative_attention_max_distance=16,
            **{"feed_forward_proj": "gated-gelu", **settings},
        )  # fmt: skip
        model = transformers().T5ForConditionalGeneration(config)
        for parameter in model.parameters():  # its own start leaves some at one value
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
