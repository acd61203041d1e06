"""One rank of the learner: a DeepSpeed engine in a process of its own.

Invariant: the gradient of a step is that of the whole batch's loss, however many rows and ranks it
was split over, and a loss or gradient that is not finite never reaches the weights.

Nothing heavy is imported with this module: DeepSpeed reads the environment when it is imported, so
`setup` sets that first. A process hosts one worker.
"""

import itertools
import json
import math
import random
import socket
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lightning_ray.algorithms.base import TokenLoss
from lightning_ray.algorithms.config import LossConfig
from lightning_ray.errors import UserError
from lightning_ray.importing import importing
from lightning_ray.learner.checkpoint import (
    STATE_FILE,
    load_generators,
    require_shape,
    save_generators,
    shape_of,
)
from lightning_ray.learner.config import RATE, LearnerConfig
from lightning_ray.learner.deepspeed_settings import (
    deepspeed_config,
    on_gpu,
    require_possible,
    resolved_dtype,
    set_environment,
    settle_deepspeed,
)
from lightning_ray.learner.folders import commit_folder, partial_folder, refuse
from lightning_ray.learner.packing import (
    PackedBatch,
    Row,
    foreign_tokens,
    pack,
    share_of_rank,
    trainable_values,
)
from lightning_ray.learner.report import StepReport, averages
from lightning_ray.learner.reshaping import load_engine
from lightning_ray.learner.schedule import learning_rate, set_rate
from lightning_ray.policies.gpu_memory import place
from lightning_ray.policies.handover import Handed, Way
from lightning_ray.trajectories.batch import list_arrays

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_ray.algorithms.losses import Part

CHECKPOINT_TAG = "learner"

# A rank waits here for another one only within a step; the conductor's own timeouts are shorter.
COLLECTIVE_TIMEOUT = timedelta(hours=2)


class LearnerWorker:
    """A rank. Call `setup` once on every rank at the same time; then every method likewise.

    The methods contain collectives: all ranks call the same method with the same arguments, in the
    same order, or they wait for each other until the collective's timeout.
    """

    def __init__(self, config: LearnerConfig, model_dir: str, rank: int) -> None:
        self.config = config
        self.model_dir = Path(model_dir)
        self.rank = rank
        self._steps = 0
        self._reference: Any = None

    def address(self) -> tuple[str, int, str]:
        """What `setup` needs if this is rank 0: its host, a free port there, bf16 or fp32."""
        import ray

        host = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
        with socket.socket() as free:
            free.bind(("", 0))
            return host, free.getsockname()[1], resolved_dtype(self.config)

    def node(self) -> str:
        """The node it is on, as Ray calls it."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def gpu(self) -> str:
        """Its node and GPU, see `gpu_memory.place`; "" without one."""
        return place() if self.config.num_gpus > 0 else ""

    def setup(self, host: str, port: int, dtype: str) -> None:
        """Meet the other ranks, load the model and make the optimiser; all compute in `dtype`.

        Raises:
            UserError: DeepSpeed cannot compute so, or there is no GPU.
        """
        self.config = replace(self.config, dtype=dtype)
        require_possible(self.config)
        set_environment(self.rank, self.config.num_ranks, host, port)
        cuda = on_gpu(self.config)
        with importing():
            import torch

            torch.set_num_threads(self.config.num_threads)
            import deepspeed

            settle_deepspeed(cuda)
            from lightning_ray.learner.loading import load_policy
            from lightning_ray.learner.optimizer import make_optimizer
            from lightning_ray.learner.publishing import Publisher
        deepspeed.init_distributed(
            "nccl" if cuda else "gloo",
            auto_mpi_discovery=False,
            timeout=COLLECTIVE_TIMEOUT,
            verbose=False,
        )
        random.seed(self.config.seed)
        np.random.seed(self.config.seed)
        torch.manual_seed(self.config.seed)
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        module = load_policy(self.model_dir, self.config, self._dtype)
        self._vocabulary = module.model.get_input_embeddings().num_embeddings
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=make_optimizer(self.config, module),
            config=deepspeed_config(self.config),
        )
        self.engine.train()
        self._publisher = Publisher(
            self.engine.module.model, self._dtype, self.rank, self.model_dir, self.config.lora
        )

    def step(self, batch: pa.Table, loss: LossConfig, own: TokenLoss | None = None) -> StepReport:
        """Take one optimiser step on the whole batch; see `StepReport`.

        `own` is the algorithm's own loss, in place of the one that `loss` names.
        """
        start = time.perf_counter()
        foreign = foreign_tokens(batch, self._vocabulary)
        packed = pack(batch.slice(0, 0) if foreign else batch, self.config.tokens_per_row, loss)
        self._steps += 1
        totals = self._accumulate(packed, loss, own)
        if packed.rows:
            set_rate(self.engine.optimizer, learning_rate(self.config, self._steps))
            self.engine.step()
        versions = trainable_values(batch, "versions")
        return StepReport(
            step=self._steps,
            skipped=foreign or self._skipped(packed, totals["loss"]),
            loss=totals["loss"],
            grad_norm=self._grad_norm() if packed.rows else 0.0,
            learning_rate=float(self.engine.get_lr()[0]),
            seconds=time.perf_counter() - start,
            sampled_tokens=packed.trainable_tokens - packed.unlearnable_tokens,
            unlearnable_tokens=packed.unlearnable_tokens,
            total_tokens=packed.total_tokens,
            computed_tokens=packed.distinct_tokens,
            rows=len(packed.rows),
            **averages(totals),
            min_version=int(versions.min()) if len(versions) else -1,
            max_version=int(versions.max()) if len(versions) else -1,
        )

    def logprobs(self, batch: pa.Table) -> list[npt.NDArray[np.float32]]:
        """The learner's logprobs of the trainable tokens, one float32 array per row of the table.

        A trainable token at position 0 has none: NaN.
        """
        import torch

        packed = pack(batch, self.config.tokens_per_row)
        found = torch.zeros(packed.trainable_tokens, device=self.engine.device)
        learnable = torch.zeros_like(found)
        self.engine.eval()
        with torch.no_grad():
            for row in share_of_rank(packed.rows, self.rank, self.config.num_ranks):
                logprobs = self._forward(row)[0]
                token = self._to_device(row.token)
                found[token] = logprobs[self._to_device(row.entry)]
                learnable[token] = 1.0
        self.engine.train()
        torch.distributed.all_reduce(found)
        torch.distributed.all_reduce(learnable)
        found[learnable == 0] = math.nan
        offsets, trainable = list_arrays(batch["trainable"])
        bounds = np.concatenate([[0], np.cumsum(trainable)])[offsets]
        values = found.cpu().numpy()
        return [values[begin:end] for begin, end in itertools.pairwise(bounds)]

    def publish(self, path: str) -> None:
        """Write a model folder: the weights, of the type that is computed in, and the base's files.

        Raises:
            FileExistsError: the folder exists; a version is never overwritten.
        """
        refuse(path)
        self._publisher.publish(Path(path))

    def hand_over(self, path: str, way: Way) -> Handed | None:
        """Hand the whole model's weights over to engines; see `LearnerGroup.hand_over`."""
        refuse(path)
        return self._publisher.hand_over(Path(path), way)

    def taken(self) -> None:
        """Every engine has what was handed over."""
        self._publisher.taken()

    def settle(self, timeout_s: float) -> None:
        """Wait until what was handed over lies on disk."""
        self._publisher.settle(timeout_s)

    def save_checkpoint(self, path: str, state: dict[str, Any]) -> None:
        """Save weights, optimiser, random generators and the caller's JSON `state` in a new folder.

        Raises:
            FileExistsError: the folder exists.
        """
        import torch

        refuse(path)
        target = Path(path)
        partial = target.with_name(f".{target.name}.partial")
        if self.rank == 0:
            partial_folder(target)
        torch.distributed.barrier()
        self.engine.save_checkpoint(str(partial), tag=CHECKPOINT_TAG, save_latest=False)
        save_generators(partial, self.rank)
        if self.rank == 0:
            own = {"steps": self._steps, "num_ranks": self.config.num_ranks}
            own |= shape_of(self.config)
            (partial / STATE_FILE).write_text(json.dumps({"learner": own, "state": state}))
        torch.distributed.barrier()
        if self.rank == 0:
            commit_folder(partial, target)
        torch.distributed.barrier()

    def load_checkpoint(self, path: str) -> dict[str, Any]:
        """Go on from a checkpoint; the next step is what it would have been without the stop.

        Returns:
            The caller's state.

        Raises:
            UserError: there is no whole checkpoint at `path`, or one of another shape (`shape_of`).
        """
        folder = Path(path)
        if not (folder / STATE_FILE).is_file():
            raise UserError(f"there is no learner checkpoint in {folder}; name one that was saved")
        saved = json.loads((folder / STATE_FILE).read_text())
        require_shape(folder, saved["learner"], self.config)
        saved_ranks = saved["learner"]["num_ranks"]
        load_engine(self.engine, folder, CHECKPOINT_TAG, saved_ranks)
        load_generators(folder, self.rank, saved_ranks)
        self._steps = saved["learner"]["steps"]
        # What the optimiser had is right for the weights; what the user has now set counts.
        for group, rate in zip(
            self.engine.optimizer.param_groups, (1.0, self.config.critic_rate), strict=False
        ):
            group["weight_decay"] = self.config.weight_decay
            group[RATE] = rate
        state: dict[str, Any] = saved["state"]
        return state

    def _to_device(self, array: npt.NDArray[Any]) -> "Tensor":
        import torch

        return torch.as_tensor(array, device=self.engine.device)

    def _forward(
        self, row: Row, with_entropy: bool = False, module: Any = None
    ) -> tuple["Tensor", "Tensor", "Tensor | None"]:
        """Logprobs, entropies and values, float32[M], of the policy or another module."""
        found: tuple[Tensor, Tensor, Tensor | None] = (self.engine if module is None else module)(
            self._to_device(row.input_ids),
            self._to_device(row.position_ids),
            self._to_device(row.subtree_end),
            self._to_device(row.logit_predictor),
            self._to_device(row.logit_target),
            with_entropy,
        )
        return found

    def _reference_logprobs(self, row: Row) -> "Tensor":
        """Logprobs under the weights that the run began with, float32[M]."""
        import torch

        if self._reference is None:
            from lightning_ray.learner.loading import load_reference

            reference = load_reference(self.model_dir, self.config, self._dtype)
            self._reference = reference.to(self.engine.device)
        with torch.no_grad():
            return self._forward(row, module=self._reference)[0]

    def _accumulate(
        self, packed: PackedBatch, loss_config: LossConfig, own: TokenLoss | None
    ) -> dict[str, float]:
        """Add up the gradients of this rank's rows; returns sums and maxima over all ranks."""
        import torch

        from lightning_ray.algorithms.losses import choose_loss, whitens
        from lightning_ray.learner.totals import Totals

        part_loss = choose_loss(loss_config, own, packed.total_weight())
        wanted = loss_config if own is None else LossConfig(aggregation=loss_config.aggregation)
        share = share_of_rank(packed.rows, self.rank, self.config.num_ranks)
        whitening = (0.0, 1.0)
        if whitens(wanted):
            whitening = self._whitening(share, wanted)
        totals = Totals(self.engine.device)
        for row in share:
            part, entropy = self._part(row, wanted, whitening)
            loss, metrics = part_loss(part)
            metrics |= {
                "loss": loss.detach(),
                "tokens": torch.tensor(float(len(row.entry)), device=self.engine.device),
                "entropy_sum": entropy.sum(),
            }
            totals.add(metrics)
            if not torch.isfinite(loss):
                # A gradient may be finite where its loss is not. Poison it, so that DeepSpeed's own
                # check sees it on every rank, clears up, and leaves the weights alone.
                # Through all that has a gradient: every rank reduces the same of it.
                loss = part.logprobs.sum() * math.nan
                if part.values is not None:
                    loss = loss + part.values.sum() * math.nan
            # DeepSpeed averages over ranks; the loss is a sum.
            self.engine.backward(loss * self.config.num_ranks)
        return totals.of_all_ranks()

    def _part(
        self, row: Row, loss: LossConfig, whitening: tuple[float, float]
    ) -> tuple["Part", "Tensor"]:
        """A row's tokens with all that the loss asks for, and their entropies."""
        from lightning_ray.algorithms.losses import Part

        entry = self._to_device(row.entry)
        reference = None
        if loss.kl.coefficient:
            reference = self._reference_logprobs(row)[entry]
        with_entropy = loss.entropy_coefficient > 0
        logprobs, entropy, values = self._forward(row, with_entropy)
        part = Part(
            logprobs=logprobs[entry],
            old_logprobs=self._to_device(row.old_logprobs),
            advantages=self._to_device(row.advantages),
            weights=self._to_device(row.weights),
            sequence=self._to_device(row.sequence),
            reference=reference,
            entropy=entropy[entry] if with_entropy else None,
            values=None if values is None else values[entry],
            whitening=whitening,
        )
        return part, entropy.detach()[entry]

    def _whitening(self, rows: list[Row], loss: LossConfig) -> tuple[float, float]:
        """Mean and deviation of the advantages over the whole batch."""
        import torch

        from lightning_ray.algorithms.losses import token_advantages

        sums = torch.zeros(3, dtype=torch.float64, device=self.engine.device)
        with torch.no_grad():
            for row in rows:
                part, _ = self._part(row, loss, (0.0, 1.0))
                found = token_advantages(part, loss).double()
                sums += torch.stack([torch.ones_like(found), found, found.square()]).sum(dim=1)
        torch.distributed.all_reduce(sums)
        count, total, squares = sums.tolist()
        mean = total / max(count, 1.0)
        variance = max(squares / max(count, 1.0) - mean * mean, 0.0)
        return mean, math.sqrt(variance) + 1e-6

    def _skipped(self, packed: PackedBatch, loss: float) -> str | None:
        if not packed.rows:
            return "nothing to learn from in the batch"
        if self.engine.was_step_applied():
            return None
        if not math.isfinite(loss):
            return "the loss was not finite"
        return "the gradient was not finite"

    def _grad_norm(self) -> float:
        """Norm before clipping. DeepSpeed gives -1 or infinity where it is not a number."""
        norm = float(self.engine.get_global_grad_norm())
        return norm if math.isfinite(norm) and norm >= 0 else math.inf
