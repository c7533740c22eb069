"""The peer: Flower's simulation on Ray; its client loads the model and runs trl's SFTTrainer, as FlowerTune does."""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from workload import INITIAL, Settings, client_file, lora_config, read_settings


def load_model(settings: Settings) -> Any:
    """Base model with a LoRA adapter around it, in float32 on the CPU."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    return get_peft_model(base, lora_config(settings))


@functools.lru_cache(maxsize=1)
def kept_model(settings: Settings) -> Any:
    """The same, loaded once a worker: for the peer that does not reload it with every message."""
    return load_model(settings)


def trainer_config(settings: Settings, output: str, *, seed: int, epochs: float = 0.0) -> Any:
    """SFTTrainer's settings: completion-only loss, constant rate, AdamW, clip norm 1, nothing saved, nothing logged."""
    from trl import SFTConfig

    return SFTConfig(
        output_dir=output,
        completion_only_loss=True,
        max_length=settings.max_length,
        max_steps=settings.local_steps if not epochs else -1,
        num_train_epochs=epochs or 1.0,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        weight_decay=0.0,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
    )


def train_client(
    settings: Settings, folder: Path, client: int, round_number: int, arrays: Any
) -> tuple[Any, int, float]:
    """One client's round: load, set the adapter, train.

    Returns:
        The adapter's tensors, the number of the client's examples, and the mean training loss.
    """
    from datasets import Dataset
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from transformers import AutoTokenizer
    from trl import SFTTrainer

    lines = client_file(folder, client).read_text(encoding="utf-8").splitlines()
    dataset = Dataset.from_list([json.loads(line) for line in lines])
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model = kept_model(settings) if settings.keep_model else load_model(settings)
    set_peft_model_state_dict(model, arrays)
    seed = settings.seed + 1000 * round_number + client
    trainer = SFTTrainer(
        model=model,
        args=trainer_config(settings, str(folder / "trainer"), seed=seed),
        train_dataset=dataset,
        processing_class=tokenizer,
    )
    result = trainer.train()
    return get_peft_model_state_dict(trainer.model), len(dataset), float(result.training_loss)


def make_client_app(folder: Path) -> ClientApp:
    """The ClientApp over a prepared folder."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        """Trains one partition from the received adapter."""
        started = time.perf_counter()
        tensors, num_examples, loss = train_client(
            read_settings(folder),
            folder,
            int(context.node_config["partition-id"]),
            int(message.content["config"]["server-round"]),
            message.content["arrays"].to_torch_state_dict(),
        )
        metrics = {"train-loss": loss, "num-examples": num_examples, "seconds": time.perf_counter() - started}
        content = RecordDict({"arrays": ArrayRecord(tensors), "metrics": MetricRecord(metrics)})
        return Message(content=content, reply_to=message)

    return app


def make_server_app(folder: Path, output: Path) -> ServerApp:
    """The ServerApp: FedAvg weighted by examples over all clients; writes the last adapter and the metrics."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        """Runs every round and writes what came out."""
        from safetensors.torch import load_file, save_file

        settings = read_settings(folder)
        strategy = FedAvg(fraction_train=1.0, fraction_evaluate=0.0, min_available_nodes=settings.clients)
        result = strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(load_file(folder / INITIAL)),
            num_rounds=settings.rounds,
            train_config=ConfigRecord({}),
        )
        save_file({key: value.contiguous() for key, value in result.arrays.to_torch_state_dict().items()}, output)
        rounds = {number: dict(record) for number, record in result.train_metrics_clientapp.items()}
        if len(rounds) != settings.rounds:
            raise RuntimeError(f"only {len(rounds)} of {settings.rounds} rounds gave an adapter")
        output.with_suffix(".json").write_text(json.dumps({"rounds": rounds}, default=float), encoding="utf-8")

    return app


def main() -> None:
    """Runs the federation of a prepared folder in Ray and writes the final adapter."""
    from flwr.simulation import run_simulation

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="prepared workload")
    parser.add_argument("output", type=Path, help="safetensors file to write")
    arguments = parser.parse_args()
    settings = read_settings(arguments.folder)
    run_simulation(
        server_app=make_server_app(arguments.folder.resolve(), arguments.output.resolve()),
        client_app=make_client_app(arguments.folder.resolve()),
        num_supernodes=settings.clients,
        backend_config={"client_resources": {"num_cpus": settings.peer_cpus, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    import flower_trl_app  # Ray's workers must import the app by name, as they do with an installed one

    flower_trl_app.main()
