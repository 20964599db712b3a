"""The answer, as data: how to reach a target batch with micro-batches that fit, and everything that was seen and
assumed.

Pure arithmetic and JSON; no torch. Bytes are bytes on the plan's device, sizes are samples, times are seconds.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, computed_field, model_validator

from autobatch.errors import InvalidInput, PlanFileError
from autobatch.files import write_whole
from autobatch.precision import Precision
from autobatch.sizes import in_steps, micro_batches, split_evenly
from autobatch.trial import Bytes, Data, DeviceInfo, Samples, Trial, complaint
from autobatch.tuned import Throughput, Tried

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn
    from torch.amp import GradScaler
    from torch.optim import Optimizer

    from autobatch.batches import Layout
    from autobatch.export.configs import Framework
    from autobatch.training import Stepper
    from autobatch.training.reduction import Given

SCHEMA_VERSION = 1


class RankShare(Data):
    """What one of several unequal ranks does in an optimizer step."""

    samples: Samples
    """Its part of the target."""
    max_micro_batch_size: Samples
    """The largest micro-batch that ran within its budget."""
    samples_per_second: float | None = None
    """How fast it was in the trial that its part was measured by."""


class TrainingPlan(Data):
    """How to train on exactly the target batch: which micro-batches, on what evidence, under which assumptions.

    Printing a plan shows it in full; `save` and `load` keep it as JSON.
    """

    model_config = ConfigDict(
        extra="ignore"
    )  # the computed fields, which are in the JSON for readers that are not Python

    schema_version: Literal[1] = 1
    target_batch_size: Samples
    """Samples behind one optimizer step, over all ranks. The plan hits it exactly."""
    world_size: Samples = 1
    rank: int = 0
    """The rank whose micro-batches `micro_batch_sizes` lists; see `for_rank`."""
    rank_shares: tuple[RankShare, ...] = ()
    """Every rank's part, where they have unequal ones by their speed; empty where the target is shared evenly."""
    micro_batch_sizes: tuple[int, ...]
    """This rank's micro-batches of one optimizer step, in order."""
    max_micro_batch_size: Samples
    """The largest micro-batch that ran within the budget."""
    min_micro_batch_size: Samples = 1
    """The fewest samples that the model runs on."""
    max_is_exact: bool = False
    """Whether one sample more was tried and did not fit, or was not needed; otherwise the maximum may be up to 2 % more
    (on the CPU, 256 MiB worth of samples, an eighth at most)."""
    peak_bytes: Bytes
    """The most that a training step with these micro-batches held on the device."""
    limit_bytes: Bytes
    """What the training process may take there."""
    budget_bytes: int
    """`limit_bytes` less the head-room: what a step was allowed to take."""
    headroom: Annotated[float, Field(ge=0, lt=1)]
    """The share of the limit that was left free."""
    evidence: Literal["measured", "predicted"] = "measured"
    """Whether the trials ran on the device, or were simulated for a device that isn't here."""
    error_bound: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Predicted: how far the peak may be from a real one, as a share of it, as found on the cards that the prediction
    was judged by."""
    verified: bool
    """Whether every size named in `micro_batch_sizes` ran whole training steps within the budget."""
    precision: Precision = "fp32"
    knobs: dict[str, str] = Field(default_factory=dict)
    """What was changed about the training step beside its sizes and precision, by `tune`: see `apply`."""
    throughput: Throughput | None = None
    """How fast it is, where `tune` made it."""
    tried: tuple[Tried, ...] = ()
    """The configurations of knobs that `tune` tried."""
    batch_dims: dict[str, int | None] = Field(default_factory=dict)
    """The batch dimension of every tensor of a batch, by its name in it ("0", "labels"); None where samples share it.
    Empty where that is not known."""
    trials: tuple[Trial, ...] = ()
    device: DeviceInfo
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of what the answer depends on: python, torch, autobatch, and CUDA where there is one."""
    assumptions: tuple[str, ...] = ()
    """What was inferred rather than given."""
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _adds_up(self) -> TrainingPlan:
        if self.target_batch_size < 1 or not 0 <= self.rank < self.world_size <= self.target_batch_size:
            raise ValueError("target_batch_size, world_size and rank contradict each other")
        if self.rank_shares and (
            len(self.rank_shares) != self.world_size
            or sum(share.samples for share in self.rank_shares) != self.target_batch_size
        ):
            raise ValueError("rank_shares do not add up to the target over all ranks")
        share = self._share(self.rank)
        if sum(self.micro_batch_sizes) != share:
            raise ValueError(
                f"micro_batch_sizes add up to {sum(self.micro_batch_sizes)}, not to this rank's {share} samples"
            )
        if not all(1 <= size <= self.max_micro_batch_size for size in self.micro_batch_sizes):
            raise ValueError(f"micro_batch_sizes go beyond max_micro_batch_size, {self.max_micro_batch_size}")
        ran = {size for trial in self.trials if trial.fits for size in trial.micro_batch_sizes}
        if self.verified and self.evidence == "predicted":
            raise ValueError("it is said to be verified, but its trials were simulated")
        if self.verified and not (set(self.micro_batch_sizes) <= ran and self.peak_bytes <= self.budget_bytes):
            raise ValueError(
                "it is said to be verified, but its trials do not show that these sizes ran within the budget"
            )
        return self

    @computed_field  # type: ignore[prop-decorator]
    @property
    def micro_batch_size(self) -> int:
        """The largest micro-batch of the plan (sizes differ by at most one)."""
        return max(self.micro_batch_sizes)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def accumulation_steps(self) -> int:
        """Micro-batches before one optimizer step."""
        return len(self.micro_batch_sizes)

    def for_rank(self, rank: int) -> TrainingPlan:
        """The same plan as another rank sees it. The sizes of all ranks add up to the target.

        Raises:
            InvalidInput: `rank` is not in 0 … world_size - 1.
        """
        if not 0 <= rank < self.world_size:
            raise InvalidInput(
                f"rank {rank} is not one of this plan's {self.world_size} ranks (0 to {self.world_size - 1})."
            )
        share, smallest = self._share(rank), self.min_micro_batch_size
        if self.rank_shares:
            largest = self.rank_shares[rank].max_micro_batch_size
            plan = self.model_copy(update={"max_micro_batch_size": largest})
            return plan._with_sizes(micro_batches(share, largest, smallest), rank)
        return self._with_sizes(in_steps(share, self.accumulation_steps, self.max_micro_batch_size, smallest), rank)

    def _share(self, rank: int) -> int:
        """The samples of a rank in one optimizer step."""
        if self.rank_shares:
            return self.rank_shares[rank].samples
        return split_evenly(self.target_batch_size, self.world_size)[rank]

    def uniform(self) -> TrainingPlan:
        """The plan with one single micro-batch size, for frameworks that take no other: the largest that divides a
        rank's share.

        It is `verified` only if that size was itself tried.

        Raises:
            InvalidInput: the target cannot be divided by the ranks, or by any size the model runs on.
        """
        share, rest = divmod(self.target_batch_size, self.world_size)
        if self.rank_shares:
            parts = ", ".join(str(share.samples) for share in self.rank_shares)
            raise InvalidInput(
                f"the ranks have unequal parts of the target ({parts} samples), so no single size is all of theirs. "
                "Make the plan without per_rank=True."
            )
        if rest:
            raise InvalidInput(
                f"a target of {self.target_batch_size} is not a multiple of {self.world_size} ranks, so no single size "
                f"hits it exactly. Targets that work: {share * self.world_size} and {(share + 1) * self.world_size}."
            )
        for size in range(min(self.max_micro_batch_size, share), self.min_micro_batch_size - 1, -1):
            if share % size == 0:
                return self._with_sizes((size,) * (share // size), self.rank)
        raise InvalidInput(
            f"no micro-batch size from {self.min_micro_batch_size} to {self.max_micro_batch_size} divides {share}."
        )

    def _with_sizes(self, sizes: tuple[int, ...], rank: int) -> TrainingPlan:
        ran = {size for trial in self.trials if trial.fits for size in trial.micro_batch_sizes}
        verified = self.evidence == "measured" and set(sizes) <= ran
        return self.model_copy(update={"micro_batch_sizes": sizes, "rank": rank, "verified": verified})

    def split(self, batch: Any, samples: int | None = None) -> Iterator[tuple[Any, float]]:
        """Cut one rank's batch into micro-batches, each with the weight that its mean loss must be given.

        Args:
            batch: any nest of tuples, lists, dicts and dataclasses of tensors; views are made, not copies. A batch of
                another size than this rank's share (a loader's last one) is split into as few micro-batches as fit.
            samples: how many samples the batch has, where the plan does not know its tensors (they have other names or
                another order than those it was made with), and neither this rank's share nor a first dimension tells.

        Yields:
            `(micro_batch, weight)`. `sum(weight * mean_loss)` over the micro-batches is the mean loss of the batch, and
            its gradient is the gradient of the whole batch. Over unequal ranks the weights make the mean that DDP takes
            over ranks the mean over all samples.

        Raises:
            InvalidInput: the batch has no dimension that can be cut, its tensors disagree about how many samples there
                are, or they are more than this rank's share.
        """
        from autobatch import batches

        layout = self.layout_of(batch, samples)
        sizes, total = self.micro_batch_sizes, self.target_batch_size / self.world_size
        if layout.size < sum(sizes):
            sizes = micro_batches(layout.size, self.max_micro_batch_size, self.min_micro_batch_size)
            total = layout.size
        for micro, size in zip(batches.split(batch, sizes, layout), sizes, strict=True):
            yield micro, size / total

    def layout_of(self, batch: Any, samples: int | None = None, is_micro_batch: bool = False) -> Layout:
        """Where the samples of one of this rank's batches are, and how many; arguments and errors as for `split`.

        Args:
            is_micro_batch: it is one of those that a loader cut, and need not be as long as this rank's share.
        """
        from autobatch import batches

        share = sum(self.micro_batch_sizes)
        layout = batches.layout_like(batch, self.batch_dims) if samples is None else None
        layout = layout or batches.find_layout(batch, expected=samples or (None if is_micro_batch else share))
        if layout.size > share:
            raise InvalidInput(
                f"the batch has {layout.size} samples, more than the {share} of one optimizer step"
                + (f" on rank {self.rank} of {self.world_size}" if self.world_size > 1 else "")
                + f": {batches.describe(batch)}. Have the loader make batches of {share}."
            )
        return layout

    def apply(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Change a model, and its optimizer, for training as the plan's knobs say; once, before the first step.
        Without knobs, nothing happens. Precision is no part of it: `stepper` and `code` see to that.

        Args:
            model: the model, on its device, before it is wrapped in DistributedDataParallel or `fully_shard`.
            optimizer: where the knob `optimizer` is among them.

        Raises:
            InvalidInput: the optimizer is needed, or it or the model has no such knob.
        """
        if self.knobs:
            from autobatch.tuning.configuration import apply_for_training

            apply_for_training(self.knobs, model, optimizer)

    def stepper(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: Callable[..., Any] | None = None,
        training_step: Callable[..., Any] | None = None,
        reduction: Given | None = None,
        scheduler: Any = None,
        scaler: GradScaler | None = None,
        clip_grad_norm: float | None = None,
        recover: bool = True,
    ) -> Stepper:
        """What trains with this plan: each `stepper.step(batch)` is one optimizer step with the whole batch's gradient.

        Args:
            model: the model, on its device; with several ranks wrapped in DistributedDataParallel or `fully_shard`.
            optimizer: stepped once for all micro-batches.
            loss: `loss(output, target)`, giving a scalar.
            training_step: `training_step(model, batch)`, giving that scalar; instead of `loss`. Without either, the
                model's own loss is taken.
            reduction: what the loss is: "mean" over samples, "sum", or a callable(batch) that counts what it is a mean
                over, such as `lambda batch: (batch["labels"] != -100).sum()`. None: known for torch's own losses, else
                found out by running it on three samples, without gradients and in evaluation mode.
            scheduler: stepped after each optimizer step that was taken.
            scaler: for gradients in fp16. None: one is made where the plan's precision is "fp16".
            clip_grad_norm: the largest norm of the gradients, over all parameters; `math.inf` only measures it.
            recover: where memory runs out, undo the step and run it again in smaller micro-batches. In
                DistributedDataParallel gradients then travel after the last backward pass instead of during it.

        Raises:
            InvalidInput: an argument cannot be used, or contradicts another or the plan.
        """
        from autobatch.training import Stepper

        return Stepper(
            self,
            model,
            optimizer,
            loss=loss,
            training_step=training_step,
            reduction=reduction,
            scheduler=scheduler,
            scaler=scaler,
            clip_grad_norm=clip_grad_norm,
            recover=recover,
        )

    def scaled_lr(self, base_lr: float, base_batch: int, rule: Literal["linear", "sqrt"] = "linear") -> float:
        """A learning rate for this target, from one that worked at `base_batch` samples.

        "linear" is the rule of Goyal et al. 2017 (arXiv:1706.02677), for SGD; "sqrt" is that of Krizhevsky 2014
        (arXiv:1404.5997), commonly used with Adam.

        Raises:
            InvalidInput: `base_batch` is below 1, or the rule is another.
        """
        if base_batch < 1 or not base_lr > 0:
            raise InvalidInput(f"base_lr and base_batch must be positive, but are {base_lr} and {base_batch}.")
        ratio = self.target_batch_size / base_batch
        if rule == "linear":
            return base_lr * ratio
        if rule == "sqrt":
            return base_lr * math.sqrt(ratio)
        raise InvalidInput(f'rule must be "linear" or "sqrt", but is {rule!r}.')

    def to(self, framework: Framework, *, tokens_per_sample: int | None = None) -> dict[str, Any]:
        """This plan as the configuration of another framework, with the one size of `uniform()`. What it cannot say is
        said in warnings (`UserWarning`).

        Args:
            framework: what the configuration is for:

                - "transformers": keyword arguments for `TrainingArguments`;
                - "lightning": `{"trainer": ..., "dataloader": ...}`, keyword arguments for `Trainer` and `DataLoader`;
                - "accelerate": `{"accelerator": ..., "dataloader": ...}`, likewise for `Accelerator` and `DataLoader`;
                - "deepspeed": entries of its JSON configuration;
                - "torchtitan": `{"training": ...}`, a section of its configuration.
            tokens_per_sample: torchtitan counts tokens in newer versions than 0.2.2, and samples in that and older
                ones. Given, the configuration is for the newer ones.

        Returns:
            A dict that is JSON.

        Raises:
            InvalidInput: the framework is not known, or no single size hits the target.
        """
        from autobatch.export.configs import config_for

        return config_for(self, framework, tokens_per_sample)

    def code(self) -> str:
        """A training loop to paste: exactly this plan, with clipping, a scheduler, and autocast and scaler where they
        apply."""
        from autobatch.report.code import training_loop

        return training_loop(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON. The file is replaced as a whole, so a failure leaves an older one as it was.

        Raises:
            PlanFileError: the file cannot be written (no such folder, no permission, disk full).
        """
        try:
            write_whole(Path(path), self.model_dump_json(indent=2) + "\n")
        except OSError as error:
            reason = error.strerror or error
            raise PlanFileError(f"the plan could not be written to {path}: {reason}. Save it elsewhere.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TrainingPlan:
        """Read a plan that `save` wrote.

        Raises:
            PlanFileError: the file is missing, damaged, or of a schema version that this autobatch does not know.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
            data = json.loads(text)
        except OSError as error:
            raise PlanFileError(f"the plan {path} could not be read: {error.strerror or error}.") from error
        except ValueError as error:  # not JSON, or not even text
            raise PlanFileError(
                f"{path} is not a plan: it is not valid JSON ({error}). Make the plan again."
            ) from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version is None:
            raise PlanFileError(f"{path} is not a plan: it names no schema_version. Make the plan again.")
        if version != SCHEMA_VERSION:
            raise PlanFileError(
                f"{path} is a plan of schema version {version}, but this autobatch reads version {SCHEMA_VERSION}. "
                "Use the autobatch that wrote it, or make the plan again."
            )
        try:
            return cls.model_validate_json(text)  # strict, where JSON has a type of its own
        except ValidationError as error:
            raise PlanFileError(f"the plan {path} is damaged: {complaint(error)}. Make the plan again.") from error

    def __str__(self) -> str:
        from autobatch.report.terminal import plan_text

        return plan_text(self)

    def __rich__(self) -> RenderableType:
        from autobatch.report.terminal import plan_panel

        return plan_panel(self)

    def _repr_html_(self) -> str:
        from autobatch.report.notebook import plan_html

        return plan_html(self)
