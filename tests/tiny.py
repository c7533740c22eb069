"""Tiny models and examples that every test of the training side shares; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from silotune.models.adapters import Adapted, attach, on, read, write
from silotune.models.fast.paths import ALL, Fast
from silotune.models.load import Base
from silotune.settings.adapters import ADAPTERS, AdapterSettings
from silotune.settings.objectives import OBJECTIVES, ObjectiveSettings
from silotune.settings.privacy import GUARANTEES, PROTECTIONS
from silotune.settings.sections import TrainingSection
from silotune.structs import Example, Tensors
from silotune.training import objectives
from silotune.training.encode import Encoded
from silotune.training.encoder import Encoder
from silotune.training.losses import Loss
from silotune.training.objectives import Objective

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CORPUS = [
    "the bank reports a positive quarter and a neutral outlook",
    "negative results weigh on the shares of the company",
    "positive neutral negative A B C D yes no maybe",
    "profit rose to five million euros from four million",
]
CONTEXT = 256


def tokenizer(*, chat: bool = True, pad: str | None = "<pad>", begin: str | None = None, end: str | None = None) -> Any:
    """A byte-level BPE tokenizer of about 300 ids; ``begin`` is put before every text, ``end`` after it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(CORPUS * 4, trainer)
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A" + (f" {end}" if end else ""),
            special_tokens=[(mark, made.token_to_id(mark)) for mark in (begin, end) if mark],
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token="</s>", bos_token=begin, pad_token=pad, cls_token=begin if end else None,
        sep_token=end,
    )  # fmt: skip
    fast.chat_template = TEMPLATE if chat else None
    return fast


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **more,
    }


def _routed() -> dict[str, Any]:
    """Sizes of a mixture of experts behind a first layer that is none."""
    return {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    }


def configuration(name: str) -> Any:
    """The configuration of a tiny model; ``-window`` stands for a sliding window of 8 ids, gpt_neo's of 16."""
    import transformers as hf

    apart = {key: value for key, value in _sizes().items() if key not in ("num_key_value_heads", "intermediate_size")}
    made: Mapping[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaConfig(**_sizes()),
        "mistral": lambda: hf.MistralConfig(**_sizes(sliding_window=None)),
        "mistral-window": lambda: hf.MistralConfig(**_sizes(sliding_window=8)),
        "qwen2": lambda: hf.Qwen2Config(**_sizes()),
        "gemma": lambda: hf.GemmaConfig(**_sizes(head_dim=8)),
        "gemma2": lambda: hf.Gemma2Config(**_sizes(head_dim=8, sliding_window=CONTEXT)),
        "gemma2-window": lambda: hf.Gemma2Config(**_sizes(head_dim=8, sliding_window=8)),
        "gemma3": lambda: hf.Gemma3TextConfig(**_sizes(head_dim=8, sliding_window=CONTEXT)),
        "gemma3-window": lambda: hf.Gemma3TextConfig(**_sizes(head_dim=8, sliding_window=8)),
        "gpt2": lambda: hf.GPT2Config(
            vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        "gpt_neox": lambda: hf.GPTNeoXConfig(**apart, intermediate_size=48),
        "phi": lambda: hf.PhiConfig(**_sizes()),
        "bert": lambda: hf.BertConfig(**apart, intermediate_size=48),
        "roberta": lambda: hf.RobertaConfig(**{**apart, "max_position_embeddings": CONTEXT + 1}, intermediate_size=48),
        "distilbert": lambda: hf.DistilBertConfig(
            vocab_size=320, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=CONTEXT,
            initializer_range=0.3, pad_token_id=0,
        ),
        "deberta-v2": lambda: hf.DebertaV2Config(**apart, intermediate_size=48),
        "modernbert": lambda: hf.ModernBertConfig(**apart, intermediate_size=48, cls_token_id=1, sep_token_id=2),
        "bloom": lambda: hf.BloomConfig(
            vocab_size=320, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3, bos_token_id=1,
            eos_token_id=2, pad_token_id=0,
        ),
        "qwen3": lambda: hf.Qwen3Config(**_sizes(head_dim=8)),
        "stablelm": lambda: hf.StableLmConfig(**_sizes()),
        "glm4": lambda: hf.Glm4Config(**_sizes(head_dim=8)),
        "phi3": lambda: hf.Phi3Config(**_sizes()),
        "gptj": lambda: hf.GPTJConfig(
            vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=CONTEXT, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        "codegen": lambda: hf.CodeGenConfig(
            vocab_size=320, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=CONTEXT, n_ctx=CONTEXT,
            initializer_range=0.3, bos_token_id=1, eos_token_id=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        "gpt_neo": lambda: hf.GPTNeoConfig(
            vocab_size=320, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            window_size=16, max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
            resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
        ),
        "falcon": lambda: hf.FalconConfig(**apart, alibi=False),
        "opt": lambda: hf.OPTConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48,
            max_position_embeddings=CONTEXT, word_embed_proj_dim=32, dropout=0.0, init_std=0.3, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
        "mpt": lambda: hf.MptConfig(
            vocab_size=320, d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT, initializer_range=0.3,
        ),
        "cohere": lambda: hf.CohereConfig(**_sizes(logit_scale=1.0)),
        "granite": lambda: hf.GraniteConfig(**_sizes()),
        "glm": lambda: hf.GlmConfig(**_sizes(head_dim=8)),
        "starcoder2": lambda: hf.Starcoder2Config(**_sizes(sliding_window=None)),
        "olmo2": lambda: hf.Olmo2Config(**_sizes()),
        "smollm3": lambda: hf.SmolLM3Config(**_sizes()),
        "mixtral": lambda: hf.MixtralConfig(**_sizes(num_local_experts=4, num_experts_per_tok=2)),
        "qwen3_moe": lambda: hf.Qwen3MoeConfig(
            **_sizes(head_dim=8), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        ),
        "glm4_moe": lambda: hf.Glm4MoeConfig(**_sizes(head_dim=8), **_routed()),
        "deepseek_v3": lambda: hf.DeepseekV3Config(
            **_sizes(num_key_value_heads=4), **_routed(), q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
            qk_nope_head_dim=8, v_head_dim=8,
        ),
        "phimoe": lambda: hf.PhimoeConfig(**_sizes(num_local_experts=4, num_experts_per_tok=2)),
        "mamba": lambda: hf.MambaConfig(
            vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.3, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        ),
        "t5": lambda: hf.T5Config(vocab_size=320, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
        "electra": lambda: hf.ElectraConfig(**apart, intermediate_size=48, embedding_size=32),
        "mpnet": lambda: hf.MPNetConfig(**{**apart, "max_position_embeddings": CONTEXT + 1}, intermediate_size=48),
        "albert": lambda: hf.AlbertConfig(**apart, intermediate_size=48, embedding_size=16),
    }  # fmt: skip
    return made[name]()


ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma", "gemma2", "gemma3", "gpt2", "gpt_neox", "phi")
ENCODERS = ("bert", "roberta", "distilbert", "deberta-v2", "modernbert", "electra", "mpnet", "albert")
WINDOWED = ("mistral-window", "gemma2-window", "gemma3-window")


def model(name: str, *, attention: str | None = None, seed: int = 0) -> Any:
    """A randomly initialised model, frozen, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": attention} if attention else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = AutoModelForCausalLM.from_config(configuration(name), **options)
    made.requires_grad_(False)
    made.config.use_cache = False
    return made.eval()


def base(name: str = "llama", *, attention: str | None = None, autocast: bool = False, words: Any = None) -> Base:
    """A base model in memory."""
    return Base(model(name, attention=attention), words or tokenizer(), torch.device("cpu"), name, autocast)


USUAL = replace(ALL, attention=False)


def adapter(**section: Any) -> AdapterSettings:
    """An adapter's settings; LoRA of rank 2 unless the section says otherwise."""
    made: AdapterSettings = ADAPTERS.read(ADAPTERS.put_over({"rank": 2, "alpha": 4}, section))
    return made


def sorted_privacy(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A section [privacy] whose keys stand beside each other, with those of the guarantee within it."""
    made = {}
    for choice, table in (("dp", GUARANTEES), ("protection", PROTECTIONS)):
        settings = table[flat.get(choice, "none")]
        made[choice] = {"type": settings.type, **{key: flat[key] for key in flat if key in settings.model_fields}}
    return made


def objective(name: str) -> Objective:
    """An objective by its name."""
    return objectives.OBJECTIVES[OBJECTIVES[name]]


def loss(name: str, adapted: Adapted, examples: Sequence[Encoded], settings: ObjectiveSettings | None = None) -> Loss:
    """An objective's loss; without settings by its defaults."""
    return objective(name).loss(adapted, examples, settings or OBJECTIVES[name]())


def adapted(
    name: str = "llama",
    *,
    attention: str | None = None,
    stirred: bool = True,
    shortcuts: Fast = USUAL,
    **section: Any,
) -> Adapted:
    """A tiny model with an adapter; ``stirred`` gives the adapter's tensors values as after training."""
    made = attach(base(name, attention=attention), adapter(**section), seed=0)
    made = on(made, shortcuts)
    if stirred:
        write(made, stir(read(made)))
    return made


def stir(tensors: Tensors, *, size: float = 0.1, seed: int = 1) -> Tensors:
    """The tensors with noise added."""
    noise = torch.Generator().manual_seed(seed)
    return {name: tensor + size * torch.randn(tensor.shape, generator=noise) for name, tensor in tensors.items()}


LABELS = ("negative", "neutral", "positive")
TEXTS = (
    "profit rose to five million", "the outlook is bad", "shares fell", "a quarter like any other",
    "the company reports results from the bank in the fourth quarter", "sales doubled", "no change", "losses grew",
)  # fmt: skip


def closed(count: int = 8, *, options: Sequence[str] = LABELS) -> list[Example]:
    """Closed-ended examples of different length."""
    return [
        Example(
            (("user", f"{TEXTS[number % len(TEXTS)]} {number}"),),
            options[number % len(options)],
            tuple(options),
            number % len(options),
            {"label": options[number % len(options)]},
        )
        for number in range(count)
    ]


def opened(count: int = 6) -> list[Example]:
    """Examples with open answers of different length."""
    return [
        Example((("system", "be short"), ("user", TEXTS[number % len(TEXTS)])), "yes " * (number % 4 + 1) + "no")
        for number in range(count)
    ]


def encoded(examples: Sequence[Example], words: Any = None, *, max_length: int = 128) -> list[Encoded]:
    """Examples as ids."""
    return Encoder(words or tokenizer(), max_length=max_length)(examples)


def training(**changes: Any) -> TrainingSection:
    """Settings of a short local round."""
    return TrainingSection(**{"batch_size": 4, "max_steps": 2, "clip_norm": 0, **changes})


def log_probabilities(model: Adapted, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """The slow way: full logits, no padding, one sequence alone, default mask and positions [answer]."""
    line = torch.tensor([[*prompt, *answer]])
    logits = model.model(input_ids=line, use_cache=False).logits[0].float()
    scores = torch.log_softmax(logits, dim=-1)
    return torch.stack([scores[len(prompt) + place - 1, number] for place, number in enumerate(answer)])


def gradients(model: Adapted, loss: torch.Tensor) -> Tensors:
    """Gradients of the adapter, which are then forgotten."""
    loss.backward()
    made = {name: parameter.grad.clone() for name, parameter in model.parameters.items()}
    for parameter in model.parameters.values():
        parameter.grad = None
    return made


def save_body(folder: Path, name: str, *, purpose: str = "AutoModel", seed: int = 0, **options: Any) -> Path:
    """A folder with a model and no head: ``AutoModel`` keeps a pooler, ``AutoModelForMaskedLM`` drops it."""
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        getattr(transformers, purpose).from_config(configuration(name)).save_pretrained(folder)
    marks = {"chat": False, "begin": "<s>", "end": "</s>"} if name in ENCODERS else {}
    tokenizer(**{**marks, **options}).save_pretrained(folder)
    return folder


def save(folder: Path, name: str = "llama", **options: Any) -> Path:
    """A folder as a user has one: model and tokenizer."""
    model(name).save_pretrained(folder)
    tokenizer(**options).save_pretrained(folder)
    return folder


def assert_same_bits(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> None:
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def assert_close(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        torch.testing.assert_close(
            tensor, right[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def pairs(count: int = 6) -> list[Example]:
    """Pairs of answers of different length, the preferred one first."""
    return [
        replace(made, rejected="no " * (number % 3 + 1) + "maybe", fields={"source": f"s{number % 2}"})
        for number, made in enumerate(opened(count))
    ]


def documents(count: int = 4) -> list[Example]:
    """Plain text."""
    return [Example((), " ".join((*TEXTS[number:], *TEXTS[:number]))) for number in range(count)]


def examples_for(objective: str, count: int = 8) -> list[Encoded]:
    """Examples that an objective of the table can learn from; ``classify`` wants a base with classes for ``LABELS``."""
    if objective == "classify":
        made = encoded(closed(count))
        return [replace(example, answer=(), options=()) for example in made]
    kinds = {"dpo": pairs, "kto": pairs, "pretrain": documents, "sft": opened}
    return encoded(kinds.get(objective, closed)(count))
