"""Requests that no client should send: each gets its documented code with a message that names
the culprit, nothing changes, and the good sequence of the same session goes on."""

import time

import grpc
import pytest

from daemon import bound
from scene import (BUDGET, MAX_ARENAS, MAX_SEQUENCES, MAX_TOKENS, METHOD, PROMPT, RING_BYTES,
                   Scene)
from dense import Kv, check_output, method_of, shape_of
from wire import v1
from worker import DIRECT, SERVED, Worker, channel_to

Code = grpc.StatusCode
INVALID, MISSING, EARLY = Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.FAILED_PRECONDITION
RANGE, FULL = Code.OUT_OF_RANGE, Code.RESOURCE_EXHAUSTED
U32, U64 = 2**32 - 1, 2**64 - 1
# Numbers at the edges of 32 and 64 bits, of signs and of products with element sizes.
EDGES32 = [2**31 - 1, 2**31, U32]
EDGES64 = [2**32, 2**53, 2**63 - 1, 2**63, U64]


@pytest.fixture(scope="module")
def scene():
    made = Scene()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def goes_on(scene):
    """After each bad request the next step of the good sequence is right."""
    yield
    scene.good_step()


def changed(message, **fields):
    """A copy of `message` with other fields."""
    copy = type(message)()
    copy.CopyFrom(message)
    for name, value in fields.items():
        copy.ClearField(name)
        if isinstance(value, (int, float, bytes)):
            setattr(copy, name, value)
        else:
            getattr(copy, name).CopyFrom(value)
    return copy


def rows(*table):
    """Parameters with readable ids: (fields or function, code, message) each."""
    return [pytest.param(*row, id=f"{i}-{row[-1][:40]}") for i, row in enumerate(table)]


# --- The session's key, in every call ----------------------------------------------------------

CALLS = ["AllocateArena", "RegisterSequence", "IngestTokens", "WaitPublished", "FetchClusters",
         "ReleaseSequence", "ListSequences"]
KEYS = {
    "unset": (lambda s: v1.SessionRef(), EARLY, "boot epoch 0 is not"),
    "no-token": (lambda s: changed(s.mine.ref, session_token=b""), Code.UNAUTHENTICATED, "token"),
    "random-token": (lambda s: changed(s.mine.ref, session_token=b"x" * 16),
                     Code.UNAUTHENTICATED, "token"),
    "cut-token": (lambda s: changed(s.mine.ref, session_token=s.mine.ref.session_token[:15]),
                  Code.UNAUTHENTICATED, "token"),
    "long-token": (lambda s: changed(s.mine.ref, session_token=s.mine.ref.session_token * 9999),
                   Code.UNAUTHENTICATED, "token"),
    "token-of-an-ended-session": (lambda s: s.gone, Code.UNAUTHENTICATED, "token"),
    "next-epoch": (lambda s: changed(s.mine.ref, boot_epoch=(s.mine.boot_epoch + 1) & U64), EARLY,
                   r"boot epoch \d+ is not this daemon's, \d+"),
    "last-epoch": (lambda s: changed(s.mine.ref, boot_epoch=U64), EARLY, f"boot epoch {U64}"),
    "not-attached": (lambda s: s.unattached.ref, EARLY, "has not attached"),
}


def request_of(scene, call):
    """A request of `call` in which nothing but the key is wrong."""
    item = scene.kv.fetch_item(scene.good.id, scene.position, 0)
    fields = {
        "AllocateArena": {"bytes": 4096},
        "RegisterSequence": {"shape": scene.shape, "method": METHOD, "max_tokens": 100,
                             "mode": SERVED, "idempotency_key": 99},
        "IngestTokens": ingest_fields(scene),
        "WaitPublished": {"sequence_id": scene.good.id},
        "FetchClusters": {"items": [item], "want_output": True},
        "ReleaseSequence": {"sequence_id": scene.good.id},
        "ListSequences": {},
    }[call]
    return fields


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_key_opens_nothing(scene, call, key):
    make, code, message = KEYS[key]
    if call == "ListSequences" and key == "unset":
        # A reference that is there but empty is a wrong one; without any, all are listed.
        assert len(scene.mine.stub.ListSequences(v1.ListSequencesRequest()).sequences) == 5
    with scene.refuses(code, message):
        scene.mine.call(call, session=make(scene), **request_of(scene, call))


def test_an_epoch_that_is_stale_is_answered_with_the_one_that_is_not(scene):
    with scene.refuses(EARLY, f"{scene.mine.boot_epoch}$"):
        scene.mine.call("ListSequences", session=changed(scene.mine.ref, boot_epoch=1))


# --- Requests that are none ---------------------------------------------------------------------

@pytest.mark.parametrize("call", CALLS)
def test_bytes_that_are_no_message_are_refused(scene, call):
    for junk in (b"\xff" * 9, b"\x0a\x7f", b"\x0a\x85\xff\xff\xff\x0f", b"\x0b\x0b\x0b"):
        raw = scene.mine.channel.unary_unary(f"/clusterkv.v1.ClusterKv/{call}")
        with scene.refuses((Code.INTERNAL, Code.UNIMPLEMENTED)):  # by gRPC; versions differ
            raw(junk, timeout=bound(20))


@pytest.mark.parametrize("call", CALLS)
def test_a_request_above_four_mebibytes_is_refused(scene, call):
    request = getattr(v1, f"{call}Request")(
        session=v1.SessionRef(session_token=b"x" * (4 << 20), boot_epoch=scene.mine.boot_epoch))
    with scene.refuses(FULL, "(?i)larger than max"):
        getattr(scene.mine.stub, call)(request, timeout=bound(20))


def test_a_method_that_is_not_there_is_unimplemented(scene):
    with scene.refuses(Code.UNIMPLEMENTED):
        fork = scene.mine.channel.unary_unary("/clusterkv.v1.ClusterKv/ForkSequence")
        fork(b"", timeout=bound(20))


# --- AllocateArena ------------------------------------------------------------------------------

@pytest.mark.parametrize("size, code, message", [
    (0, INVALID, "bytes is 0"),
    (2**40 + 1, INVALID, f"bytes is {2**40 + 1}, allowed are 1 to {2**40}"),
    *((edge, INVALID, f"bytes is {edge}") for edge in EDGES64[1:]),
    (2**40, FULL, f"gpu-memory: {2**40} bytes"),
    (2**32, FULL, f"gpu-memory: {2**32} bytes"),
])
def test_arenas_are_bounded(scene, size, code, message):
    with scene.refuses(code, message):
        scene.mine.call("AllocateArena", bytes=size)


@pytest.mark.parametrize("size", [64 << 30, 900 << 30])
def test_an_arena_beyond_the_machines_memory_is_refused_at_once(start_daemon, size):
    """Where no --gpu-memory bounds it. Linux would promise it, and kill somebody later."""
    with open("/proc/meminfo", encoding="ascii") as file:
        memory = {name: int(kibibytes.split()[0]) << 10 for name, kibibytes in
                  (line.split(":") for line in file)}
    size = max(size, 2 * memory["MemTotal"])
    if size > 2**40:
        pytest.skip("this machine has room for the largest arena")
    daemon = start_daemon()
    with Worker(daemon.address) as worker:
        worker.allocate_ring(4096)
        before = daemon.steady()
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            worker.call("AllocateArena", bytes=size)
        assert time.monotonic() - started < bound(2)
        assert caught.value.code() == FULL and str(size) in caught.value.details()
        assert daemon.steady() == before
        worker.allocate_ring(1 << 20)  # what fits is given
    daemon.wait_until_free()


def test_a_session_has_only_so_many_arenas(scene):
    with scene.refuses(FULL, f"has {MAX_ARENAS} arenas"):
        scene.other.call("AllocateArena", bytes=4096)


# --- RegisterSequence ---------------------------------------------------------------------------

def shape_row(field, value, message):
    return {"shape": changed(shape_of(), **{field: value})}, INVALID, message


def method_row(field, value, message, code=INVALID):
    return {"method": changed(METHOD, **{field: value})}, code, message


def method_bounds():
    """A row below and some above the range of each parameter."""
    bounds = {"sink_tokens": (0, 1024), "min_window_tokens": (0, 65536),
              "decode_segment_tokens": (1, 65536), "prompt_segment_tokens": (1, 65536),
              "tokens_per_cluster": (1, 4096), "kmeans_iterations": (1, 1000),
              "window_lag_segments": (0, 64), "budget_tokens": (1, 1048576)}
    for field, (least, most) in bounds.items():
        for value in [least - 1] * (least > 0) + [most + 1, *EDGES32]:
            yield method_row(field, value, f"{field} is {value}; allowed: {least} to {most}")


REGISTER = rows(
    *(shape_row("layers", value, f"layers is {value}") for value in (0, 1025, *EDGES32)),
    *(shape_row("kv_heads", value, f"kv_heads is {value}") for value in (0, 1025, *EDGES32)),
    *(shape_row("q_heads", value, f"q_heads is {value}") for value in (0, 1, 3, 34, *EDGES32)),
    *(shape_row("head_dim", value, f"head_dim is {value}") for value in (0, 65, 512, *EDGES32)),
    *(shape_row("dtype", value, f"dtype is {value}") for value in (0, 4, 2**31 - 1)),
    ({"shape": v1.Shape()}, INVALID, "dtype is 0"),
    *method_bounds(),
    *(method_row("group", value, f"group is {value}") for value in (0, 4, 2**31 - 1)),
    *(method_row("cache_tokens", value, f"cache_tokens is {value}; allowed")
      for value in (1, 2 * BUDGET + 31, 16777217, *EDGES32)),
    *(method_row("softmax_scale", value, f"softmax_scale is {text}") for value, text in (
        (-1.0, "-1"), (float("inf"), "inf"), (float("-inf"), "-inf"), (float("nan"), "-?nan"))),
    ({"method": v1.Method()}, INVALID, "group is 0"),
    *(({"max_tokens": value}, INVALID, f"max_tokens is {value}")
      for value in (0, 16777217, *EDGES32)),
    *(({"reserve_tokens": value}, INVALID, f"reserve_tokens {value} is above max_tokens 100")
      for value in (101, *EDGES32)),
    *(({"mode": value}, INVALID, f"mode is {value}") for value in (0, 3, 2**31 - 1)),
    ({"idempotency_key": 0}, INVALID, "idempotency_key is 0"),
    # One segment of one KV head must fit a chunk.
    ({"shape": shape_of(head_dim=256, dtype=v1.DTYPE_FP32), "max_tokens": 10000,
      "method": changed(METHOD, prompt_segment_tokens=8192)}, INVALID, "host-chunk"),
    ({"max_tokens": 16777216, "method": changed(METHOD, decode_segment_tokens=320)}, FULL,
     "gpu-memory|host pool"),
    ({"max_tokens": 100000}, FULL, "host pool|gpu-memory"),
    ({"method": changed(METHOD, min_window_tokens=65536, decode_segment_tokens=2)}, INVALID,
     "may begin 65538 segments of a .*, at most 65536"),
    ({"shape": shape_of(layers=1024, kv_heads=1024, group=16, head_dim=256),
      "max_tokens": 16777216}, INVALID, "the state of 1024 layers|host-chunk"),
    ({"shape": shape_of(layers=1024, kv_heads=64)}, FULL, "gpu-memory: "),
    (method_row("cache_tokens", 16777216, "gpu-memory: ", FULL)),
)


@pytest.mark.parametrize("fields, code, message", REGISTER)
def test_registration_checks_every_field(scene, fields, code, message):
    request = {"shape": scene.shape, "method": METHOD, "max_tokens": 100, "mode": SERVED,
               "idempotency_key": 1000}
    with scene.refuses(code, message):
        scene.mine.call("RegisterSequence", **{**request, **fields})


def test_a_host_pool_that_is_promised_is_full(scene):
    # Within the device's budget, above the pool's 32 MiB.
    small_cache = method_of(budget_tokens=8, tokens_per_cluster=64, min_window_tokens=0)
    with scene.refuses(FULL, r"host pool: .* \d+"):
        scene.mine.call("RegisterSequence", shape=shape_of(dtype=v1.DTYPE_FP32),
                        method=small_cache, max_tokens=40000, mode=SERVED, idempotency_key=1000)


def test_registering_again_by_the_same_key_gives_the_same_sequence(scene):
    fields = {"shape": scene.shape, "method": METHOD, "max_tokens": MAX_TOKENS, "mode": SERVED}
    before = scene.picture()
    again = scene.mine.call("RegisterSequence", **fields, idempotency_key=2)
    assert again == scene.good.reply
    assert scene.picture() == before
    for name, value in (("max_tokens", MAX_TOKENS - 1), ("mode", DIRECT), ("reserve_tokens", 8),
                        ("shape", shape_of(layers=1)), ("method", changed(METHOD, seed=8))):
        with scene.refuses(Code.ALREADY_EXISTS, f"idempotency_key 2 is sequence {scene.good.id}"):
            scene.mine.call("RegisterSequence", **{**fields, name: value}, idempotency_key=2)
    # Another session's keys are its own, and a released sequence's key is free again.
    assert scene.foreign.reply.sequence_id != scene.good.id
    first = scene.mine.call("RegisterSequence", **{**fields, "max_tokens": 60},
                            idempotency_key=1000)
    scene.mine.call("ReleaseSequence", sequence_id=first.sequence_id)
    second = scene.mine.call("RegisterSequence", **{**fields, "max_tokens": 61},
                             idempotency_key=1000)
    assert second.sequence_id != first.sequence_id
    scene.mine.call("ReleaseSequence", sequence_id=second.sequence_id)
    scene.wait_quiet()


def test_a_session_has_only_so_many_sequences(scene):
    fields = {"shape": scene.shape, "method": METHOD, "max_tokens": 20, "mode": SERVED}
    last = scene.mine.call("RegisterSequence", **fields, idempotency_key=1000)
    scene.wait_quiet()
    with scene.refuses(FULL, f"has {MAX_SEQUENCES} sequences"):
        scene.mine.call("RegisterSequence", **fields, idempotency_key=1001)
    scene.mine.call("ReleaseSequence", sequence_id=last.sequence_id)
    scene.wait_quiet()


# --- IngestTokens -------------------------------------------------------------------------------

ROW_BYTES = 2 * 2 * 64 * 2  # K and V of a token of one layer of the scene's shape
OPEN_KEY = 10  # above the keys used so far


def ingest_fields(scene, **fields):
    """The next range of layer 1 of `open`: nothing is wrong with it."""
    return {"sequence_id": scene.open.id, "position": 20, "count": 10, "layer_begin": 1,
            "layer_count": 1, "arena_id": scene.ring.arena_id, "ring_offset": 0,
            "idempotency_key": OPEN_KEY, **fields}


INGEST = rows(
    *(({"sequence_id": value}, MISSING, f"no sequence {value}") for value in (0, 99, *EDGES64)),
    (lambda s: {"sequence_id": s.foreign.id}, MISSING, "no sequence"),
    *(({"arena_id": value}, MISSING, f"no arena {value}") for value in (0, 99, *EDGES32)),
    (lambda s: {"arena_id": s.foreign_arena}, MISSING, "no arena"),
    (lambda s: {"arena_id": s.direct.reply.state_arena_id}, MISSING, "no arena"),
    ({"count": 0}, INVALID, "count is 0"),
    *(({"count": value}, RANGE, rf"tokens 20 \+ {value} are beyond max_tokens {MAX_TOKENS}")
      for value in (MAX_TOKENS - 19, *EDGES32)),
    *(({"position": value}, RANGE, rf"tokens {value} \+ 10") for value in (MAX_TOKENS, *EDGES32)),
    ({"position": U32, "count": U32}, RANGE, rf"tokens {U32} \+ {U32}"),
    ({"position": 19}, EARLY, "layer 1 expects position 20, not 19"),
    ({"position": 21}, EARLY, "layer 1 expects position 20, not 21"),
    ({"position": 0}, EARLY, "layer 1 expects position 20, not 0"),
    ({"layer_begin": 0}, EARLY, "layer 0 expects position 30, not 20"),
    ({"layer_begin": 0, "layer_count": 2}, EARLY, "layer 0 expects position 30"),
    ({"layer_count": 0}, INVALID, r"layers 1 \+ 0"),
    *(({"layer_count": value}, INVALID, rf"layers 1 \+ {value}") for value in (2, *EDGES32)),
    *(({"layer_begin": value}, INVALID, rf"layers {value} \+ 1") for value in (2, *EDGES32)),
    ({"layer_begin": U32, "layer_count": U32}, INVALID, rf"layers {U32} \+ {U32}"),
    *(({"ring_offset": value}, INVALID, f"offset {value} is not a multiple of 64")
      for value in (1, 32, 65, 2**63 - 1, U64)),
    *(({"ring_offset": value}, INVALID, f"at offset {value} do not lie in arena")
      for value in (RING_BYTES, RING_BYTES - 64, RING_BYTES - 10 * ROW_BYTES + 64, 2**32, 2**63,
                    2**64 - 64)),
    ({"idempotency_key": 0}, INVALID, "idempotency_key 0"),
    ({"idempotency_key": 1}, INVALID, "idempotency_key 1 does not rise above 2"),
    ({"idempotency_key": 2}, INVALID, "idempotency_key 2 does not rise above 2"),
    ({"end_of_prompt": True, "count": RING_BYTES // ROW_BYTES + 1, "position": 20}, RANGE,
     "beyond max_tokens"),
    (lambda s: {"sequence_id": s.full.id, "position": PROMPT, "count": 1}, RANGE,
     "beyond max_tokens"),
    (lambda s: {"sequence_id": s.good.id, "position": s.position, "count": 1}, EARLY,
     f"prompt of layer 1 has ended at {PROMPT}"),
    (lambda s: {"sequence_id": s.good.id, "position": s.position, "count": 1,
                "end_of_prompt": True}, EARLY, "has ended"),
    (lambda s: {"sequence_id": s.direct.id, "position": 100, "count": 1, "end_of_prompt": True},
     EARLY, "prompt of layer 1 has ended at 100"),
)


@pytest.mark.parametrize("fields, code, message", INGEST)
def test_ingest_checks_every_field(scene, fields, code, message):
    if callable(fields):
        fields = fields(scene)
    with scene.refuses(code, message):
        scene.mine.call("IngestTokens", **ingest_fields(scene, **fields))


def test_the_last_range_can_be_sent_again(scene):
    again = ingest_fields(scene, position=20, layer_begin=0, idempotency_key=2,
                          ring_offset=scene.open.last_offset)
    scene.wait_quiet()
    before = scene.picture()
    assert scene.mine.call("IngestTokens", **again).ingested_tokens == 20
    assert scene.picture() == before
    with scene.refuses(INVALID, "does not rise"):  # another range by the same key
        scene.mine.call("IngestTokens", **{**again, "ring_offset": again["ring_offset"] + 64})


# --- WaitPublished, ReleaseSequence -------------------------------------------------------------

@pytest.mark.parametrize("fields, code, message", rows(
    *(({"sequence_id": value}, MISSING, f"no sequence {value}") for value in (0, 99, *EDGES64)),
    (lambda s: {"sequence_id": s.foreign.id}, MISSING, "no sequence"),
    (lambda s: {"sequence_id": s.open.id}, EARLY, "length 0 asks for the prompt"),
    *(({"length": value}, RANGE, f"length {value} is beyond max_tokens {MAX_TOKENS}")
      for value in (MAX_TOKENS + 1, *EDGES32)),
))
def test_waiting_checks_every_field(scene, fields, code, message):
    if callable(fields):
        fields = fields(scene)
    with scene.refuses(code, message):
        scene.mine.call("WaitPublished", **{"sequence_id": scene.good.id, "length": 0, **fields})


def test_waiting_ends_at_the_deadline_and_takes_its_waiter_back(scene):
    with scene.refuses(Code.DEADLINE_EXCEEDED):
        scene.mine.call("WaitPublished", sequence_id=scene.open.id, length=MAX_TOKENS, timeout=0.3)


def test_a_session_has_only_so_many_waiters(scene):
    request = v1.WaitPublishedRequest(session=scene.mine.ref, sequence_id=scene.open.id,
                                      length=MAX_TOKENS)
    before = scene.picture()
    calls = [scene.mine.stub.WaitPublished.future(request, timeout=bound(60))
             for _ in range(4097)]
    deadline = time.monotonic() + bound(20)
    while not (refused := [call for call in calls if call.done()]):  # whichever came last
        assert time.monotonic() < deadline, "none is refused"
        time.sleep(0.02)
    assert [call.code() for call in refused] == [FULL]
    assert "4096 calls wait already" in refused[0].details()
    for call in calls:
        call.cancel()
    assert scene.picture() == before


@pytest.mark.parametrize("value", [0, 99, *EDGES64, "foreign"])
def test_only_ones_own_sequences_can_be_released(scene, value):
    number = scene.foreign.id if value == "foreign" else value
    with scene.refuses(MISSING, f"no sequence {number}"):
        scene.mine.call("ReleaseSequence", sequence_id=number)


def test_releasing_twice_is_not_found_and_wakes_who_waits(scene):
    extra = scene.mine.register(scene.shape, METHOD, 200, SERVED)
    scene.wait_quiet()
    waiting = scene.mine.stub.WaitPublished.future(
        v1.WaitPublishedRequest(session=scene.mine.ref, sequence_id=extra.id, length=200),
        timeout=30)
    scene.mine.release(extra)
    assert waiting.exception(bound(20)).code() == MISSING
    scene.wait_quiet()
    with scene.refuses(MISSING, f"no sequence {extra.id}"):
        scene.mine.release(extra)


# --- FetchClusters ------------------------------------------------------------------------------

def fetch(**changes):
    """A row's function: one item of `good` at its next step, layer 0, with the item changed."""
    return lambda s: {"items": [s.kv.fetch_item(s.good.id, s.position, 0, **{
        name: value(s) if callable(value) else value for name, value in changes.items()})]}


def tensor(**place):
    return v1.TensorRef(**place)


def arena_tensor(**fields):
    """A q of the right size in the ring, with the place changed."""
    def make(scene):
        place = {"arena_id": scene.ring.arena_id, "offset": 0, "bytes": 4 * 64 * 2, **fields}
        return tensor(arena=v1.ArenaRange(**place))
    return make


def output_place(**fields):
    def make(scene):
        return v1.ArenaRange(**{"arena_id": scene.ring.arena_id, "offset": 0,
                                "bytes": 4 * 65 * 4, **fields})
    return make


def two_of_good(scene):
    item = scene.kv.fetch_item(scene.good.id, scene.position, 0)
    return {"items": [item, item]}


def second_is_bad(scene):
    return {"items": [scene.kv.fetch_item(scene.good.id, scene.position, 0),
                      scene.kv.fetch_item(scene.open.id, 20, 0)]}


def second_is_foreign(scene):
    return {"items": [scene.kv.fetch_item(scene.good.id, scene.position, 0),
                      scene.kv.fetch_item(scene.foreign.id, PROMPT, 0)]}


def too_many(scene):
    return {"items": [scene.kv.fetch_item(scene.good.id, scene.position, 0)] * 257}


FETCH = rows(
    (lambda s: {"items": []}, INVALID, "0 items, allowed are 1 to 256"),
    (too_many, INVALID, "257 items"),
    (two_of_good, INVALID, "is there twice"),
    (second_is_bad, EARLY, "prompt is not published"),
    (second_is_foreign, MISSING, "no sequence"),
    *((fetch(sequence_id=value), MISSING, f"no sequence {value}") for value in (0, 99, *EDGES64)),
    (fetch(sequence_id=lambda s: s.foreign.id), MISSING, "no sequence"),
    (fetch(sequence_id=lambda s: s.direct.id), EARLY, "it is fetched directly"),
    (fetch(sequence_id=lambda s: s.open.id), EARLY, "prompt is not published"),
    (fetch(sequence_id=lambda s: s.full.id, position=PROMPT), RANGE,
     f"position {PROMPT} is beyond max_tokens {PROMPT}"),
    (fetch(position=lambda s: s.position + 1), EARLY, r"position \d+ layer 0 expected"),
    (fetch(position=lambda s: s.position - 1), EARLY, r"position \d+ layer 0 expected"),
    *((fetch(position=value), EARLY, rf"not {value} and 0") for value in (0, *EDGES32)),
    *((lambda s, layer=value: {"layer": layer}, INVALID, f"layer {value} of 2")
      for value in (2, *EDGES32)),
    (lambda s: {"layer": 1}, EARLY, r"layer 0 expected, not \d+ and 1"),
    *((lambda s, budget=value: {"budget_tokens": budget}, INVALID,
       f"budget_tokens {value} is above its {BUDGET}") for value in (BUDGET + 1, *EDGES32)),
    *((fetch(**{name: tensor()}), INVALID, f"{name} is missing") for name in "qkv"),
    *((fetch(**{name: tensor(inline=b"x" * size)}), INVALID, f"{name} has {size} bytes")
      for name in "qkv" for size in (0, 1, 255, 1024)),
    *((fetch(q=arena_tensor(**place)), code, message) for place, code, message in (
        ({"arena_id": 0}, INVALID, "q: arena_id is 0"),
        ({"arena_id": 99}, MISSING, "no arena 99"),
        ({"arena_id": U32}, MISSING, f"no arena {U32}"),
        ({"bytes": 511}, INVALID, "q has 511 bytes, not 512"),
        ({"bytes": U64}, INVALID, f"q has {U64} bytes"),
        ({"bytes": 0}, INVALID, "q has 0 bytes"),
        ({"offset": 8}, INVALID, "offset 8 is not a multiple"),
        ({"offset": RING_BYTES}, INVALID, f"offset {RING_BYTES} do not lie"),
        ({"offset": RING_BYTES - 64}, INVALID, "do not lie in arena"),
        ({"offset": 2**63}, INVALID, "do not lie in arena"),
        ({"offset": 2**64 - 64}, INVALID, "do not lie in arena"))),
    *((fetch(output_arena=output_place(**place)), code, message) for place, code, message in (
        ({"arena_id": 0}, INVALID, "output_arena: arena_id is 0"),
        ({"arena_id": 99}, MISSING, "no arena 99"),
        ({"bytes": 4 * 64 * 4}, INVALID, "output has 1024 bytes, not 1040"),
        ({"bytes": U64}, INVALID, "output has"),
        ({"offset": 32}, INVALID, "not a multiple"),
        ({"offset": RING_BYTES - 1024}, INVALID, "do not lie in arena"),
        ({"offset": 2**64 - 64}, INVALID, "do not lie in arena"))),
)


@pytest.mark.parametrize("make, code, message", FETCH)
def test_fetch_checks_every_field(scene, make, code, message):
    fields = {"items": [scene.kv.fetch_item(scene.good.id, scene.position, 0)],
              "want_output": True, **make(scene)}
    with scene.refuses(code, message):
        scene.mine.call("FetchClusters", **fields)


def test_a_batch_is_of_one_shape(scene):
    small = shape_of(layers=1)
    extra = scene.mine.register(small, METHOD, 50, SERVED)
    kv = Kv(small, 50)
    scene.mine.ingest(extra, scene.ring, kv, 30)
    scene.mine.wait(extra)
    scene.wait_quiet()
    with scene.refuses(INVALID, "another shape or budget"):
        scene.mine.call("FetchClusters", items=[
            scene.kv.fetch_item(scene.good.id, scene.position, 0), kv.fetch_item(extra.id, 30, 0)])
    scene.mine.release(extra)
    scene.wait_quiet()


def test_the_last_call_can_be_repeated_and_layers_go_in_order(scene):
    first = scene.mine.fetch(scene.good, scene.kv, scene.position, 0, want_output=True,
                             want_selection=True)
    scene.wait_quiet()
    before = scene.picture()[2]
    again = scene.mine.fetch(scene.good, scene.kv, scene.position, 0, want_output=True,
                             want_selection=True)
    assert again.output == first.output and again.lse == first.lse
    assert again.selected_positions == first.selected_positions
    assert scene.picture()[2] == before
    for position, layer in ((scene.position + 1, 0), (scene.position + 1, 1)):
        with scene.refuses(EARLY, f"position {scene.position} layer 1 expected"):
            scene.mine.fetch(scene.good, scene.kv, position, layer)
    check_output(scene.mine.fetch(scene.good, scene.kv, scene.position, 1), scene.kv, 1,
                 scene.position)
    scene.position += 1


# --- Session ------------------------------------------------------------------------------------

def hello(**fields):
    return v1.SessionRequest(hello=v1.Hello(**{
        "protocol_version_min": 1, "protocol_version_max": 1, "state_layout_versions": [1],
        "client_name": "bad", **fields}))


def group(**fields):
    return v1.SessionGroup(**{"id": "g", "rank": 0, "world_size": 2, **fields})


@pytest.mark.parametrize("requests, code, message", rows(
    ([], INVALID, "ended without Hello"),
    ([v1.SessionRequest()], INVALID, "first message must be Hello"),
    ([hello(protocol_version_min=2, protocol_version_max=9)], EARLY, "2 to 9 offered.* speaks 1"),
    ([hello(protocol_version_min=0, protocol_version_max=0)], EARLY, "0 to 0 offered"),
    ([hello(protocol_version_min=U32, protocol_version_max=U32)], EARLY, f"{U32} to {U32}"),
    ([hello(protocol_version_min=2, protocol_version_max=0)], EARLY, "2 to 0 offered"),
    ([hello(state_layout_versions=[])], EARLY, r"layout versions \[\] offered.* writes 1"),
    ([hello(state_layout_versions=[0, U32])], EARLY, rf"\[0, {U32}\] offered"),
    ([hello(client_name="n" * 129)], INVALID, "client_name has 129 bytes, at most 128"),
    ([hello(group=group(id="g" * 129))], INVALID, "id of 129 bytes"),
    ([hello(group=group(world_size=0))], INVALID, "world_size 0"),
    ([hello(group=group(world_size=1025))], INVALID, "world_size 1025"),
    ([hello(group=group(rank=2))], INVALID, "rank 2 of world_size 2"),
    ([hello(group=group(rank=U32, world_size=U32))], INVALID, f"rank {U32}"),
    ([hello(group=v1.SessionGroup())], INVALID, "world_size 0"),
))
def test_a_session_begins_with_a_good_hello(scene, requests, code, message):
    with scene.refuses(code, message):
        for event in scene.mine.stub.Session(iter(requests), timeout=bound(20)):
            raise AssertionError(event)


def test_a_name_that_is_not_text_is_no_hello(scene):
    name = b"\xff\xfe"
    payload = b"\x08\x01\x10\x01\x1a\x01\x00\x22" + bytes([len(name)]) + name
    raw = scene.mine.channel.stream_stream("/clusterkv.v1.ClusterKv/Session")
    before = scene.picture()
    with pytest.raises(grpc.RpcError) as caught:
        for event in raw(iter([b"\x0a" + bytes([len(payload)]) + payload]), timeout=bound(20)):
            raise AssertionError(event)
    assert caught.value.code() in (INVALID, Code.INTERNAL)
    assert scene.picture() == before


def test_only_so_many_sessions_are_open(scene):
    with Worker(scene.daemon.address, "fourth", attach=False):
        with scene.refuses(FULL, "4 sessions are open"):
            Worker(scene.daemon.address, "fifth", attach=False)
    scene.wait_quiet()


def test_a_second_hello_ends_its_session_alone(scene):
    stub = v1.ClusterKvStub(channel_to(scene.daemon.address))
    stream = stub.Session(iter([hello(), hello()]), timeout=bound(20))
    with pytest.raises(grpc.RpcError) as caught:
        for event in stream:  # the second may come before the answer to the first
            assert event.HasField("welcome")
    assert caught.value.code() == Code.ABORTED
    assert "second message" in caught.value.details()
    sessions_become(scene, 3)


def sessions_become(scene, count):
    deadline = time.monotonic() + bound(5)
    while scene.daemon.status()["sessions"] != count:
        assert time.monotonic() < deadline, scene.daemon.status()["session_list"]
        time.sleep(0.02)


@pytest.mark.parametrize("leave", ["cancel", "second-hello", "half-close"])
def test_a_stream_that_ends_before_its_welcome_leaves_no_session(scene, leave):
    stub = v1.ClusterKvStub(channel_to(scene.daemon.address))
    for i in range(60):
        requests = [hello(), hello()] if leave == "second-hello" else [hello()]
        stream = stub.Session(iter(requests), timeout=bound(20))
        if leave == "cancel":
            time.sleep(i * 0.00005)
            stream.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            for _ in stream:
                pass
        # More than there may be at a time, until those before have ended.
        assert caught.value.code() in (Code.ABORTED, Code.CANCELLED, FULL)
    sessions_become(scene, 3)
    scene.wait_quiet()


# --- At the end ---------------------------------------------------------------------------------

def test_what_was_open_all_along_ends_right(scene):
    """`open` was the target of most rows: it goes on where it stood."""
    scene.open.next_key = OPEN_KEY
    scene.mine.ingest_range(scene.open, scene.ring, scene.kv, 1, 1, 10)
    scene.mine.ingest_range(scene.open, scene.ring, scene.kv, 0, 2, 100, last=True)
    scene.mine.wait(scene.open)
    for position in range(130, 140):
        for layer in range(scene.shape.layers):
            check_output(scene.mine.fetch(scene.open, scene.kv, position, layer), scene.kv, layer,
                         position)
    assert not scene.mine.failed
