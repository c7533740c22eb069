"""Puts a trainable adapter on a base model, and reads and writes it as named tensors.

LoRA: Hu et al. 2021; rsLoRA: Kalajdzievski 2023; DoRA: Liu et al. 2024; IA3: Liu et al. 2022;
QLoRA: Dettmers et al. 2023. The layers are peft's; names of tensors are those of peft's saved files.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from silotune.errors import MessageError, ModelError, unknown_choice
from silotune.lora import residuals, without_residuals
from silotune.models import lora_layers
from silotune.models.elsewhere import Elsewhere
from silotune.models.fast.paths import PLAIN, Fast, put_on
from silotune.models.load import Base
from silotune.seeds import derive
from silotune.settings.adapters import IA3, AdapterSettings, Lora, PeftSettings, QLora
from silotune.settings.registry import implemented
from silotune.structs import Tensors

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Adapted:
    """A base model that carries one adapter.

    Attributes:
        base: The base model and tokenizer; its weights are shared by every adapter of a run.
        model: The module to call; a peft model, or the base itself when all weights are trained.
        parameters: The trained tensors by their name in a saved adapter.
        config: Contents of peft's ``adapter_config.json``; empty when all weights are trained.
        start: The trained tensors that training began with, which make the reference of preference objectives; empty
            when all weights are trained.
        keeps_rows_apart: Every example goes through the model in rows of its own, so that its gradient is separate from
            the others'; nothing is computed once for all of them.
        fast: The shortcuts that are taken.
    """

    base: Base
    model: torch.nn.Module
    parameters: Mapping[str, torch.nn.Parameter]
    config: Mapping[str, Any]
    start: Tensors = field(default_factory=dict)
    keeps_rows_apart: bool = False
    fast: Fast = PLAIN

    @property
    def num_base_parameters(self) -> int:
        """Values of the base model, the adapter's not counted (packed int4 weights count as stored)."""
        total = sum(parameter.numel() for parameter in self.base.model.parameters())
        own = sum(parameter.numel() for parameter in self.parameters.values())
        return total - own - lora_layers.num_frozen(self.model) if self.config else total

    @cached_property
    def elsewhere(self) -> Elsewhere | None:
        """What stands for blocks that a compute server has; None for a whole model. Looked up once."""
        return next((module for module in self.base.model.modules() if isinstance(module, Elsewhere)), None)

    @cached_property
    def is_checkpointed(self) -> bool:
        """Whether activations are computed anew in the backward pass; looked up once, as every module is asked."""
        return bool(self.base.model.is_activation_checkpointing)

    @cached_property
    def draws_randomly(self) -> bool:
        """Whether a training step draws random numbers: dropout as a module, in the adapter too, or in the config.

        Looked up once: every training step asks.
        """
        modules = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in self.model.modules())
        settings = self.base.model.config.get_text_config().to_dict()
        named = any("drop" in name and isinstance(value, float) and value > 0 for name, value in settings.items())
        return modules or named


def attach(base: Base, section: AdapterSettings, *, seed: int, has_core: bool = False, known_rank: int = 0) -> Adapted:
    """Puts a fresh adapter on a base model, its initial values drawn from ``seed``.

    Args:
        base: The loaded base; the same object must not carry another adapter.
        section: The ``[adapter]`` section.
        seed: The run's seed.
        has_core: Fix LoRA's factors and train a matrix between them (`lora_layers`).
        known_rank: Of a trained adapter that is about to be written here: up to it no rank is too large.

    Raises:
        ModelError: A target module does not exist, the architecture has no default targets, peft has no such adapter
            for it, or the rank is above that of every layer.
    """
    if section.is_whole:
        base.model.requires_grad_(True)
        return Adapted(base, base.model, dict(base.model.named_parameters()), {})
    from peft import get_peft_model

    with torch.random.fork_rng(), warnings.catch_warnings(), _one_line_errors(section):
        # peft 0.21 itself asks an int4 model for the attribute that transformers 5 renamed
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # merging unties them
        # it looks for fused experts among the modules only, and finds them among the parameters later
        warnings.filterwarnings("ignore", message="The following (rank|alpha)_pattern keys did not match")
        peft_config = implemented(CONFIGS, section)(base, section)
        _check_size(base, peft_config, known_rank)
        torch.manual_seed(derive(seed, "adapter-init"))
        model = get_peft_model(base.model, peft_config)
        if has_core:
            lora_layers.add_cores(model)
    model.eval()
    peft_config.base_model_name_or_path = base.name  # as given: peft put the folder it was read from
    parameters = _saved_names(model)
    return Adapted(base, model, parameters, _as_json(peft_config), _copies(parameters))


def begin_from(adapted: Adapted, tensors: Tensors) -> Adapted:
    """The model, started from other trained tensors, such as those of an earlier run, and set to their values.

    Raises:
        ModelError: They are of another adapter, or all weights are trained.
    """
    if not adapted.start:
        raise ModelError("adapter.start needs an adapter: with adapter.type = 'none' give the model as model.name")
    try:
        write(adapted, tensors)
    except MessageError as error:
        raise ModelError(f"adapter.start does not fit the adapter of this run: {error}") from error
    return replace(adapted, start=tensors)


def on(adapted: Adapted, fast: Fast) -> Adapted:
    """The same model in memory, which from now on takes these shortcuts and no other."""
    put_on(adapted.base.model, adapted.model, fast)
    return replace(adapted, fast=fast)


@contextmanager
def at_start(adapted: Adapted) -> Iterator[None]:
    """Inside the block the model is the one that training began with, without dropout; afterwards it is as before.

    For a fresh adapter that is the base: LoRA's B is 0 and IA3's factors are 1 at first.

    Raises:
        ModelError: All weights are trained, so their first values are not kept.
    """
    if not adapted.start:
        raise ModelError("with adapter.type = 'none' no reference model is kept; use an adapter such as 'lora'")
    now = {name: parameter.detach().clone() for name, parameter in adapted.parameters.items()}
    now |= lora_layers.residuals_of(adapted.model) if adapted.config else {}
    is_training = adapted.model.training
    adapted.model.train(False)
    write(adapted, adapted.start)
    try:
        yield
    finally:
        write(adapted, now)
        adapted.model.train(is_training)


def replicate(adapted: Adapted) -> Adapted:
    """A second adapter around the same base weights, so that two clients can train at one time.

    Frozen tensors are shared; trained ones and buffers are copied. Of a quantised base nothing can be shared safely:
    `can_replicate` says so.
    """
    trained = {id(parameter) for parameter in adapted.parameters.values()}
    shared = {id(parameter): parameter for parameter in adapted.model.parameters() if id(parameter) not in trained}
    model: Any = copy.deepcopy(adapted.model, shared)
    if not adapted.config:
        base = replace(adapted.base, model=model)
        return replace(adapted, base=base, model=model, parameters=dict(model.named_parameters()))
    base = replace(adapted.base, model=model.get_base_model())
    return replace(adapted, base=base, model=model, parameters=_saved_names(model))


def can_replicate(adapted: Adapted) -> bool:
    """Whether `replicate` can be used: a model on the CPU whose weights are plain floating-point tensors."""
    return adapted.base.device.type == "cpu" and all(
        parameter.is_floating_point() for parameter in adapted.model.parameters()
    )


def read(adapted: Adapted) -> Tensors:
    """Copies of the trained tensors, on the CPU, by their saved names."""
    return _copies(adapted.parameters)


def _copies(parameters: Mapping[str, torch.nn.Parameter]) -> Tensors:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in parameters.items()}


def write(adapted: Adapted, tensors: Tensors) -> None:
    """Overwrites the trained tensors in place; residuals are put beside them, and those not given are taken away.

    Raises:
        MessageError: A name is missing or left over, or a shape differs.
    """
    pairs = residuals(tensors)
    if pairs or adapted.config:
        lora_layers.set_residuals(adapted.model, pairs)
    tensors = without_residuals(tensors)
    if tensors.keys() != adapted.parameters.keys():
        odd = sorted(tensors.keys() ^ adapted.parameters.keys())[0]
        raise MessageError(f"adapter tensor {odd!r} is on one side only")
    with torch.no_grad():
        for name, parameter in adapted.parameters.items():
            if parameter.shape != tensors[name].shape:
                raise MessageError(
                    f"adapter tensor {name!r} has shape {tuple(tensors[name].shape)}, "
                    f"the model wants {tuple(parameter.shape)}"
                )
            parameter.copy_(tensors[name])


@contextmanager
def frozen(adapted: Adapted, names: Collection[str]) -> Iterator[None]:
    """Keeps some of the trained tensors from getting gradients for a while."""
    parameters = [adapted.parameters[name] for name in names]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def exported(adapted: Adapted, tensors: Tensors) -> tuple[Tensors, dict[str, Any]]:
    """Tensors of a global model, and the configuration beside them, as plain peft loads them.

    Their rank is above ``adapter.rank`` where the model has a residual.
    """
    return lora_layers.as_plain_lora(adapted.model, tensors, adapted.config)


def merged(adapted: Adapted) -> PreTrainedModel:
    """The base model with the adapter worked into its weights: a plain transformers model. The adapter is gone."""
    base, model = adapted.base, adapted.model
    if not adapted.config:
        return base.model
    _untie(base.model)
    for name in base.head:  # peft's own way reads the head's weight, and a head of several layers has no such weight
        base.model.set_submodule(name, base.model.get_submodule(name).modules_to_save["default"])  # type: ignore[index, arg-type]
    with torch.no_grad():
        plain: PreTrainedModel = model.merge_and_unload()  # type: ignore[operator]
    return plain


def _untie(model: PreTrainedModel) -> None:
    """Gives the output head its own copy of the weights it shares with the embedding, if either of them is adapted."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    plain: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    is_adapted = any(isinstance(end, BaseTunerLayer) for end in ends)
    if is_adapted and plain[1] is not None and plain[0].weight is plain[1].weight:
        plain[1].weight = torch.nn.Parameter(plain[0].weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False


def linear_names(model: PreTrainedModel, head: Sequence[str] = ()) -> list[str]:
    """Last parts of the names of all linear layers but those of the output head, sorted."""
    outputs = [model.get_output_embeddings(), *(model.get_submodule(name) for name in head)]
    left_out = {id(part) for output in outputs if output is not None for part in output.modules()}
    names = set()
    for name, module in model.named_modules():
        linear = isinstance(module, torch.nn.Linear) or type(module).__name__ in ("Conv1D", "Linear4bit")
        if linear and id(module) not in left_out:
            names.add(name.rpartition(".")[2])
    return sorted(names)


def _lora(base: Base, section: Lora) -> PeftConfig:
    from peft import LoraConfig
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,  # type: ignore[arg-type]  # peft only divides by it
        lora_dropout=section.dropout,
        target_modules=_targets(base, section, DEFAULTS),
        fan_in_fan_out=_stored_transposed(base.model),
        use_rslora=section.rslora,
        use_dora=section.dora,
        task_type=base.task_type,
        modules_to_save=list(base.head) or None,
    )


def _ia3(base: Base, section: IA3) -> PeftConfig:
    from peft import IA3Config
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as DEFAULTS

    targets = _targets(base, section, DEFAULTS)
    if targets == "all-linear":
        targets = linear_names(base.model, base.head)
    known = FEEDFORWARD.get(base.model.config.model_type, [])
    inner = [name for name in targets if name in known]
    return IA3Config(
        target_modules=targets,
        feedforward_modules=inner,
        fan_in_fan_out=_stored_transposed(base.model),
        task_type=base.task_type,
        modules_to_save=list(base.head) or None,
    )


LARGEST_SCALE = 1e4
"""What an adapter's update may be multiplied by: alpha / rank."""


def _check_size(base: Base, config: PeftConfig, known_rank: int) -> None:
    """Refuses a rank far above that of every layer's matrix, and an alpha that leaves no finite number.

    That is before any memory is allocated. Up to twice the layers' rank is let through: a trained adapter has its
    residual beside its own factors, and may be trained on.
    """
    from transformers.pytorch_utils import Conv1D

    rank: int = getattr(config, "r", 0)
    alpha: float = getattr(config, "lora_alpha", None) or getattr(config, "alpha", None) or 0.0
    sizes = [
        (module.in_features, module.out_features) if isinstance(module, torch.nn.Linear) else (module.nx, module.nf)
        for module in base.model.modules()
        if isinstance(module, (torch.nn.Linear, Conv1D))
    ]
    most = max((min(size) for size in sizes), default=rank)
    if rank > max(2 * most, known_rank):
        raise ModelError(
            f"adapter.rank = {rank}: no layer of {base.name!r} has a rank above {most}; take at most {most}"
        )
    if rank and alpha > LARGEST_SCALE * rank:
        raise ModelError(
            f"adapter.alpha = {alpha:g} scales the update by {alpha / rank:g} (alpha / rank); take at most "
            f"{LARGEST_SCALE * rank:g}"
        )


@contextmanager
def _one_line_errors(section: AdapterSettings) -> Iterator[None]:
    """What peft says of an adapter that it has not for a model, or not with these settings."""
    try:
        yield
    except (NotImplementedError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"adapter.type = {section.type!r} does not go with this model: {reason}") from error


def _stored_transposed(model: PreTrainedModel) -> bool:
    """Whether the linear layers are GPT-2's Conv1D, which stores [in, out]."""
    return any(type(module).__name__ == "Conv1D" for module in model.modules())


CONFIGS: Mapping[type[AdapterSettings], Callable[[Base, Any], PeftConfig]] = {
    Lora: _lora,
    QLora: _lora,
    IA3: _ia3,
}
"""Settings -> peft's configuration of the adapter that they are of."""


def _targets(base: Base, section: PeftSettings, defaults: Mapping[str, Sequence[str]]) -> str | list[str]:
    if section.targets == "all-linear":
        return "all-linear"
    if section.targets == "auto":
        known = defaults.get(base.model.config.model_type)
        return list(known) if known else "all-linear"
    modules = [name for name, _ in base.model.named_modules()]
    for target in section.targets:
        if not any(name == target or name.endswith("." + target) for name in modules):
            raise ModelError(
                f"adapter.targets: {unknown_choice('module', target, linear_names(base.model, base.head))}, "
                "or 'auto', or 'all-linear'"
            )
    return list(section.targets)


def _saved_names(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Trained parameters by the names peft gives them in a saved file (matched by their memory)."""
    from peft import get_peft_model_state_dict

    by_memory = {parameter.data_ptr(): parameter for parameter in model.parameters() if parameter.requires_grad}
    saved = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = {lora_layers.trained_name(name): by_memory.get(tensor.data_ptr()) for name, tensor in saved.items()}
    return {name: parameter for name, parameter in found.items() if parameter is not None}  # a core's factors are fixed


def _as_json(peft_config: PeftConfig) -> dict[str, Any]:
    """The configuration as peft writes it to disk, so that a saved adapter is peft's own format."""
    document: dict[str, Any] = json.loads(json.dumps(peft_config.to_dict(), sort_keys=True, default=sorted))
    # peft keeps sets, whose order differs by process, and names the common heads a second time
    for name in ("target_modules", "feedforward_modules", "modules_to_save"):
        if isinstance(document.get(name), list):
            document[name] = sorted(set(document[name]))
    return {**document, "inference_mode": True}
