"""What must hold of the ranks of a scene: memory, streams, collectives, and that nobody waits for ever."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

import torch
from torch import Tensor

from common.registry.layout import turns_ahead
from tests.helpers.recorder import MESSAGES, Batch, Collective, agree
from tests.rehearsal.scene import STEPS, Ran, Scene
from tests.rehearsal.trace import COMPUTE, Moment
from tests.rehearsal.traffic import ATTENTION, MULTIPLIES

STEP_SYNCS = {
    "common/video/latents.py:require_finite": "NaN is told at the step where it arose; one number a step",
    "common/system/progress.py:_synchronize": "times and the bar count finished work; once a step, at its end",
}
"""Where the host waits for the GPU inside a sampling step, and why it may."""
STEP_COPIES = {
    "common/weights/blocks.py:copy": "a block in host memory, from page-locked memory, on a stream of its own",
    "common/weights/load.py:_fill": "a block read from its file, by the reading thread on a stream of its own",
    "cogvideox_xdit/sampling.py:local": "the DPM solver's noise, which a CPU generator draws for every layout alike",
}
"""What is copied between devices inside a sampling step, and why."""
SAMPLING = "sampling "


def check(scene: Scene, ran: Sequence[Ran]) -> None:
    """AssertionError that says on which rank of which scene what is wrong."""
    for one in ran:
        for part in (check_devices, check_memory, check_steps, check_attention, check_overlap):
            try:
                part(scene, one)
            except AssertionError as error:
                raise AssertionError(f"{scene}, rank {one.rank}: {error}") from error
    agree([one.record for one in ran])
    check_exchanges(ran)
    check_ends(ran)


def check_devices(scene: Scene, ran: Ran) -> None:
    """Tensors lie on this rank's GPU or the CPU; NCCL gets contiguous ones from the GPU, gloo from the CPU.

    A kernel that got tensors of two devices has raised already: fake tensors know.
    """
    assert ran.trace.devices <= {f"cuda:{ran.rank % 8}", "cpu"}, f"tensors on {ran.trace.devices}"
    for step, collective in ran.trace.collectives:
        kinds = {device for _, _, device in collective.tensors}
        where = f"{collective.op} of {collective.group} in {step}"
        assert len(kinds) == 1, f"{where} has tensors on {kinds}"
        assert collective.contiguous, f"{where} has a tensor that is not contiguous"
        if collective.group != ran.axes.get("world"):
            assert kinds == {"cuda"}, f"{where}: only the group of all ranks has gloo, and it gets tensors on {kinds}"


def check_memory(scene: Scene, ran: Ran) -> None:
    assert not ran.trace.hazards, f"{len(ran.trace.hazards)} races: {ran.trace.hazards[:3]}"


def check_steps(scene: Scene, ran: Ran) -> None:
    """Inside a sampling step the host waits, and copies between devices, only where it is listed."""
    for sync in ran.trace.syncs:
        if sync.step.startswith(SAMPLING):
            assert sync.where in STEP_SYNCS, f"the host waits in {sync.where}, {sync.step}"
    for copy in ran.trace.copies:
        if copy.step.startswith(SAMPLING):
            assert copy.where in STEP_COPIES, f"a copy to {copy.target} in {copy.where}, {copy.step}"
            if copy.where == "common/weights/blocks.py:copy":
                assert not copy.waits and copy.stream != COMPUTE, f"a block's copy is not asynchronous: {copy}"


def expected_attention(scene: Scene) -> str:
    """The kernel of the joint attention, as operators are named."""
    if scene.dtype == "fp32":
        return "_scaled_dot_product_efficient_attention"
    if scene.attention == "cudnn":
        return "_scaled_dot_product_cudnn_attention"
    automatic = scene.attention == "auto" and scene.layout.ring > 1 and scene.capability[0] in (9, 10)
    return f"_scaled_dot_product_{'cudnn' if automatic else 'flash'}_attention"


def check_attention(scene: Scene, ran: Ran) -> None:
    """The card's kernel runs, and no other, but for the small ones that SDPA itself chooses."""
    used = {op for step, _, op in ran.trace.launches if step.startswith(SAMPLING) and op in ATTENTION}
    assert expected_attention(scene) in used, f"{expected_attention(scene)} does not run, but {used}"
    assert used <= {expected_attention(scene), "_scaled_dot_product_flash_attention"}, f"{used} run"


def check_overlap(scene: Scene, ran: Ran) -> None:
    """What is said to travel behind work has work between where it is posted and where somebody waits for it."""
    moments = [moment for moment in ran.trace.timeline if moment.step.startswith(SAMPLING)]
    steps = len({moment.step for moment in moments})
    if scene.layout.ring > 1:
        passed = [m for m in moments if m.what == "post" and _is_pass(m.subject, ran.axes["ring"])]
        hidden = [m for m in passed if _between(moments, m) & ATTENTION]
        assert passed and len(hidden) == len(passed), f"{len(hidden)} of {len(passed)} passes lie behind attention"
    if (scene.groups > 1 or scene.turns) and scene.layout.ulysses > 1:
        posted = [m for m in moments if m.what == "post" and m.subject.group == ran.axes["ulysses"]]
        hidden = [m for m in posted if _between(moments, m) & MULTIPLIES]
        # With a lead one branch begins each step alone, and the other ends it alone.
        lead = turns_ahead(scene.layout.ring, scene.layout.ulysses, scene.groups) if scene.turns else 0
        assert len(hidden) >= len(posted) - 2 * lead * steps > 0, f"{len(hidden)} of {len(posted)} exchanges are hidden"
    # The first block has nothing before it; where two experts sample, the first step of each is called the first.
    alone = STEPS // steps
    if scene.shard and scene.layout.ranks > 1:
        gathers = [m for m in moments if m.what == "post" and m.subject.op == "_allgather_base_"]
        hidden = [m for m in gathers if _between(moments, m) & MULTIPLIES]
        assert gathers and len(hidden) >= len(gathers) - alone, f"{len(hidden)} of {len(gathers)} gathers are hidden"
    elif scene.offload == "block":
        copies = [i for i, m in enumerate(moments) if m.what == "copy" and m.stream != COMPUTE]
        hidden_copies = [i for i in copies if _until_event(moments, i) & MULTIPLIES]
        assert copies and len(hidden_copies) >= len(copies) - alone, f"{len(hidden_copies)} of {len(copies)} are hidden"


def _is_pass(collective: Collective, ring: str) -> bool:
    """Whether keys and values go on to the next rank: all to one other."""
    if collective.group != ring or len(collective.splits) != 2:
        return False
    return collective.op == "all_to_all_single" and sum(n > 0 for n in collective.splits[1]) <= 1


def _between(moments: Sequence[Moment], post: Moment) -> set[str]:
    """Kernels that are queued after a collective was posted and before somebody waits for it."""
    start = next(i for i, moment in enumerate(moments) if moment is post)
    return _launched(moments, start, lambda moment: moment.what == "wait" and moment.subject is post.subject)


def _until_event(moments: Sequence[Moment], start: int) -> set[str]:
    return _launched(moments, start, lambda moment: moment.what == "wait_event")


def _launched(moments: Sequence[Moment], start: int, ends) -> set[str]:
    found = set()
    for moment in moments[start + 1 :]:
        if ends(moment):
            break
        if moment.what == "launch":
            found.add(moment.subject)
    return found


def check_exchanges(ran: Sequence[Ran]) -> None:
    """What one rank sends another is what that one expects: collective by collective, message by message."""
    groups = {name: group for one in ran for name, group in one.record.made.items()}
    for name, group in groups.items():
        own = [[c for c in ran[rank].record.collectives if c.group == name] for rank in group.ranks]
        for calls in zip(*([c for c in calls if c.op not in MESSAGES] for calls in own), strict=True):
            _check_call(calls, f"{group}")
        sent: defaultdict[tuple[int, int, str], list[Collective]] = defaultdict(list)
        expected: defaultdict[tuple[int, int, str], list[Collective]] = defaultdict(list)
        for i, calls in enumerate(own):
            for call in calls:
                if call.op in MESSAGES and call.peer is not None:
                    sending = call.op == "send"
                    pair = (i, call.peer) if sending else (call.peer, i)
                    (sent if sending else expected)[(*pair, call.tensors[0][2])].append(call)
        assert sent.keys() == expected.keys(), f"{group}: messages {sent.keys()} are sent, {expected.keys()} awaited"
        for way, calls in sent.items():
            there = [call.tensors for call in expected[way]]
            assert [call.tensors for call in calls] == there, f"{group}: other messages come than are awaited on {way}"


def _check_call(calls: Sequence[Collective], group: str) -> None:
    """One collective as each of its ranks sees it."""
    kinds = {tuple(dtype for _, dtype, _ in call.tensors) for call in calls}
    assert len(kinds) == 1, f"{group}: dtypes differ: {kinds}"
    if calls[0].splits:
        rows = {call.tensors[0][0][1:] for call in calls}
        assert len(rows) == 1, f"{group}: rows of an all-to-all differ: {rows}"
        for i, call in enumerate(calls):
            sent = call.splits[1]
            assert sum(sent) == call.tensors[0][0][0], f"{group}: splits {sent} of {call.tensors[0][0]}"
            expected = tuple(other.splits[0][i] for other in calls)
            assert sent == expected, f"{group}: rank {i} sends {sent}, the others expect {expected}"
    else:
        shapes = {tuple(shape for shape, _, _ in call.tensors) for call in calls}
        assert len(shapes) == 1, f"{group}: {calls[0].op} with shapes {shapes}"
        assert len({call.peer for call in calls}) == 1, f"{group}: {calls[0].op} from different ranks"


def check_ends(ran: Sequence[Ran]) -> None:
    """Nobody waits for ever: the ranks' hosts and streams are replayed together.

    A collective happens when every rank that takes part has come to it on its group's stream, and what it depends on
    there has happened. Of a batch each message happens when both ends have come to theirs, and the batch is done with
    the last of them. A host goes on at once, but for where it waits.
    """
    hosts = [deque(m for m in one.trace.timeline if m.what in ("post", "host")) for one in ran]
    queues: list[defaultdict[str, deque[Moment]]] = [defaultdict(deque) for _ in ran]
    done: list[defaultdict[str, int]] = [defaultdict(int) for _ in ran]
    left_of: dict[int, set[tuple[str, int]]] = {}

    def ready(rank: int, moment: Moment, own: bool) -> bool:
        return all(
            done[rank][stream] >= time - (own and stream == moment.stream) for stream, time in moment.knows.items()
        )

    moved = True
    while moved:
        moved = False
        for rank, host in enumerate(hosts):
            while host and (host[0].what == "post" or ready(rank, host[0], own=False)):
                moment = host.popleft()
                moved = True
                if moment.what == "post":
                    queues[rank][moment.stream].append(moment)
        for rank, streams in enumerate(queues):
            for stream in [stream for stream, queue in streams.items() if queue]:
                head = streams[stream][0]
                if isinstance(head.subject, Batch):
                    met = _meet(ran, rank, head, queues, left_of) if ready(rank, head, own=True) else None
                    for r in met or ():
                        queues[r][stream].popleft()
                        done[r][stream] += 1
                        moved = True
                    continue
                takers = _takers(ran, rank, streams[stream][0], queues)
                if takers is not None and all(ready(r, queues[r][s][0], own=True) for r, s in takers):
                    for r, s in takers:
                        queues[r][s].popleft()
                        done[r][s] += 1
                    moved = True
    stuck = {r: host[0] for r, host in enumerate(hosts) if host}
    left = {r: s for r, streams in enumerate(queues) for s, queue in streams.items() if queue}
    assert not stuck and not left, f"hosts wait for ever at {stuck}, collectives of {left} never happen"


def _meet(
    ran: Sequence[Ran],
    rank: int,
    moment: Moment,
    queues: Sequence[defaultdict[str, deque[Moment]]],
    left_of: dict[int, set[tuple[str, int]]],
) -> list[int]:
    """Let the messages of a batch happen of which the other end has come too; the ranks whose batches are done then.

    left_of: the messages that have still to happen, (op, peer), of every batch that has come.
    """
    members = ran[rank].record.made[moment.subject.group].ranks
    mine, me = left_of.setdefault(id(moment), _ends(moment.subject)), members.index(rank)
    finished = []
    for op, peer in list(mine):
        queue = queues[members[peer]][moment.stream]
        if queue and isinstance(queue[0].subject, Batch):
            theirs = left_of.get(id(queue[0]), set())
            back = ("recv_" if op == "send" else "send", me)
            if back in theirs:
                mine.remove((op, peer))
                theirs.remove(back)
                finished += [] if theirs else [members[peer]]
    return finished + ([] if mine else [rank])


def _ends(batch: Batch) -> set[tuple[str, int]]:
    ends = {(message.op, message.peer) for message in batch.messages if message.peer is not None}
    assert len(ends) == len(batch.messages), f"two messages one way between two ranks in {batch}"
    return ends


def _takers(
    ran: Sequence[Ran], rank: int, moment: Moment, queues: Sequence[defaultdict[str, deque[Moment]]]
) -> list[tuple[int, str]] | None:
    """The ranks and streams at whose heads the parts of one collective are; None while some are not there."""
    call: Collective = moment.subject
    members = ran[rank].record.made[call.group].ranks
    if call.op not in MESSAGES:
        takers = [(other, moment.stream) for other in members]
        heads = [queues[r][s][0].subject if queues[r][s] else None for r, s in takers]
        return takers if all(head is not None and head.op == call.op for head in heads) else None
    assert call.peer is not None
    other, me = members[call.peer], members.index(rank)
    op = "recv_" if call.op == "send" else "send"
    stream = moment.stream if moment.stream.startswith("nccl") else f"gloo {call.group} {op} {me}"
    queue = queues[other][stream]
    if not queue or queue[0].subject.op != op or queue[0].subject.peer != me:
        return None
    return [(rank, moment.stream), (other, stream)]


def check_result(scene: Scene, ran: Sequence[Ran], latents: tuple[int, ...], frames: tuple[int, ...]) -> None:
    """Shapes, dtypes and devices of what comes back."""
    for one in ran:
        result, where = one.result, f"{scene}, rank {one.rank}"
        if scene.output == "latent":
            said = (tuple(result.shape), result.dtype, str(result.device))
            assert said == (latents, torch.float32, f"cuda:{one.rank % 8}"), f"{where}: {said}"
        elif one.rank:
            assert result is None, f"{where}: only rank 0 has frames"
        else:
            assert isinstance(result, Tensor)
            said = (tuple(result.shape), result.dtype, str(result.device))
            assert said == (frames, torch.uint8, "cpu"), f"{where}: {said}"
