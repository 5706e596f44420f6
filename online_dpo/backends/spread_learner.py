"""A learner whose workers are on nodes of a cluster: each reads policies where they lie on its own node."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from ray.actor import ActorHandle

from online_dpo.backends.node_files import NodeFiles
from online_dpo.backends.ray_cluster import RayLearner, in_step, wait
from online_dpo.backends.sharing import share
from online_dpo.errors import ConfigError, LearnerError
from online_dpo.models import digest_folder
from online_dpo.protocols import TrainJob, TrainStart, TrainStep
from online_dpo.types import Candidate, Policy, Probe, Prompt


class SpreadLearner(RayLearner):
    """`protocols.Learner`. Where worker 0's node does not see the run folder, the trained policy is fetched from it.

    A run folder that all nodes share is needed for what workers keep on disk between steps or blocks alone:
    `learner.save_every`, and `source: {every_steps: k}`.
    """

    def __init__(
        self, workers: Sequence[ActorHandle], nodes: Sequence[str], files: NodeFiles, *, checkpoints: bool
    ) -> None:
        """`nodes`: each worker's. `checkpoints`: whether `learner.save_every` is set."""
        super().__init__(workers)
        self.nodes = list(nodes)
        self.files = files
        self.checkpoints = checkpoints

    def train(self, job: TrainJob) -> Iterator[TrainStart | TrainStep | Policy]:
        """`protocols.Learner.train`."""
        job = with_whole_paths(job)
        sees = self.files.all_see(job.out.parent, self.nodes)
        if not all(sees.values()):
            job = self._without_shared_folder(job, sees)
        first = self.nodes[0]
        out = job.out if sees[first] else self.files.empty(first)
        jobs = {node: share(own, LearnerError) for node, own in self._jobs(job, out).items()}
        streams = [
            worker.train.options(num_returns="streaming").remote(jobs[node])
            for worker, node in zip(self.workers, self.nodes, strict=True)
        ]
        for event in in_step(streams):
            yield event if not isinstance(event, Policy) else self._home(event, first, job.out)

    def score(self, policy: Policy, items: Sequence[tuple[Prompt, Candidate]]) -> list[list[float]]:
        """`protocols.Learner.score`."""
        at = self.files.bring(policy, self.nodes)
        shared = list(items)
        asked = [worker.score.remote(at[node], shared) for worker, node in zip(self.workers, self.nodes, strict=True)]
        results: list[list[list[float]]] = wait(asked, LearnerError, "a learner worker")
        return results[0]

    def probe(self, policy: Policy, token_ids: Sequence[int]) -> Probe:
        """`protocols.Learner.probe`."""
        at = self.files.bring(policy, self.nodes)
        asked = [
            worker.probe.remote(at[node], token_ids) for worker, node in zip(self.workers, self.nodes, strict=True)
        ]
        probes: list[Probe] = wait(asked, LearnerError, "a learner worker")
        return probes[0]

    def _jobs(self, job: TrainJob, out: Path) -> dict[str, TrainJob]:
        """The job as each node's workers can read it."""
        policies = self.files.bring(job.policy, self.nodes)
        references = self.files.bring(job.reference, self.nodes)
        sources = None if job.source is None else self.files.bring(job.source, self.nodes)
        return {
            node: replace(
                job,
                policy=policies[node],
                reference=references[node],
                source=None if sources is None else sources[node],
                out=out,
            )
            for node in set(self.nodes)
        }

    def _home(self, policy: Policy, node: str, out: Path) -> Policy:
        """The trained policy in the run folder. Raises `LearnerError` when it arrives damaged."""
        if policy.path != out:
            self.files.fetch(node, policy.path, out)
            if digest_folder(out) != policy.digest:
                raise LearnerError(f"the policy {policy.id} arrived damaged from the node that trained it")
        return replace(policy, path=out)

    def _without_shared_folder(self, job: TrainJob, sees: dict[str, bool]) -> TrainJob:
        """The job for nodes that have no run folder. Raises `ConfigError` for what cannot do without one."""
        blind = sum(not seen for seen in sees.values())
        if self.checkpoints and job.checkpoint is not None:
            raise ConfigError(
                f"learner.save_every keeps a state in the run folder that all workers read, and {blind} of "
                f"{len(sees)} nodes do not see {job.out.parent}: put `output` on a shared file system, or leave it out"
            )
        if job.part is not None and (job.part.begin or job.part.end):
            raise ConfigError(
                f"source: every_steps keeps the optimiser's state in the run folder, and {blind} of {len(sees)} nodes "
                f"do not see {job.out.parent}: put `output` on a shared file system"
            )
        job = replace(job, checkpoint=None)  # nobody can be asked to keep a state that all must see
        return job if sees[self.nodes[0]] else replace(job, cache=None)


def with_whole_paths(job: TrainJob) -> TrainJob:
    """`job` without paths relative to the driver's folder: workers of a cluster are in another one."""

    def whole(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    part = job.part
    if part is not None:
        part = replace(part, begin=whole(part.begin), end=whole(part.end))
    return replace(
        job,
        out=job.out.absolute(),
        folders=tuple(folder.absolute() for folder in job.folders),
        cache=whole(job.cache),
        checkpoint=whole(job.checkpoint),
        part=part,
    )
