"""Every bound in ARCHITECTURE.md is the one in the code, and is reached by a test; none in the code is left out."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from gateway import (
    acceptor,
    call,
    counters,
    failure,
    journal,
    key,
    meter,
    plane,
    quota,
    replica,
    route,
    sqlite,
    stream,
    target,
    tokens,
    workers,
)
from gateway.config import Model, Server
from gateway.edge import admin, coding, connection, grpc_call, inference, request, server, texts
from gateway.edge import grpc as edge_grpc
from runtimes import Spec, batch, onnx, process, remote, remote_shelf, triton_client, vllm, wav, wire, words
from runtimes import connection as upstream
from runtimes.dialect import bounded, elements, entries, kserve_grpc, protobuf
from runtimes.http2 import connection as http2
from runtimes.http2 import fields, reader
from runtimes.http2 import stream as http2_stream
from runtimes.rpc import channel as rpc_channel
from runtimes.rpc import wire as rpc_wire

ROOT = Path(__file__).parents[2]
TABLE = (ROOT / "ARCHITECTURE.md").read_text().partition("## Bounds\n")[2].partition("\n## ")[0]


class Row(NamedTuple):
    """`says` is the table's bound with the code's own numbers in it, `tests` are where it is reached."""

    says: str
    tests: Sequence[str]


def default(struct: type, field: str) -> Any:
    return next(it.default for it in msgspec.structs.fields(struct) if it.name == field)


def kib(size: float) -> str:
    return f"{size / 1024:g} KiB"


def mib(size: float) -> str:
    return f"{size / 1024 / 1024:g} MiB"


B = call.Bounds()
CONNECTION, OPENAI = "gateway/test_connection.py", "gateway/test_openai.py"
JOURNAL, WIRE, METER = "gateway/test_journal.py", "runtimes/test_wire.py", "gateway/test_meter.py"
DIALECT, OIP = "runtimes/test_dialect_openai.py", "runtimes/test_dialect_kserve.py"
KSERVE, GRPC, GRPC_WIRE = "gateway/test_kserve.py", "gateway/test_grpc.py", "gateway/test_grpc_wire.py"
HTTP2, RPC, WORDS = "runtimes/test_http2.py", "runtimes/test_rpc.py", "runtimes/test_words.py"
RETRIES, SLOW = "gateway/test_retries.py", "e2e/test_slow_clients.py"
PROCESS, DRAIN = "runtimes/test_process.py", "e2e/test_drain.py"
TRITON = "runtimes/test_triton.py"
HERE = "docs/test_bounds_reached.py"

ROWS = {
    "connections; those the kernel holds": Row(
        f"{B.connections_max:,}; {server.BACKLOG:,}",
        [f"{CONNECTION}::test_connections_are_limited_and_then_free_again"],
    ),
    "header:": Row(
        f"{kib(B.header_bytes_max)}, {B.headers_max}, {B.header_s_max:g} s",
        [f"{CONNECTION}::test_a_header_too_large_is_a_431", f"{CONNECTION}::test_a_slow_header_is_a_408"],
    ),
    "body:": Row(
        f"{mib(B.body_bytes_max)}, {B.body_s_max:g} s, {B.json_depth_max}",
        [
            f"{CONNECTION}::test_a_chunked_body_too_large_is_a_413",
            f"{CONNECTION}::test_a_slow_body_is_a_408",
            "gateway/test_depth.py::test_deep_json_is_refused",
        ],
    ),
    "requests sent ahead": Row("what one read brings", [f"{HERE}::test_requests_sent_ahead_stay_in_the_socket"]),
    "a connection between two": Row(f"{connection.IDLE_S_MAX:g} s", [f"{HERE}::test_an_idle_connection_is_closed"]),
    "an answer that its client does not read": Row(
        f"{kib(connection.UNREAD_BYTES_MAX)} and one write, {B.write_s_max:g} s",
        [
            f"{SLOW}::test_the_slow_are_closed_hold_little_and_harm_nobody",
            f"{CONNECTION}::test_a_client_that_does_not_read_is_cut_off",
        ],
    ),
    "a refused client's time": Row(f"{connection.LINGER_S:g} s", [f"{HERE}::test_a_refused_client_is_not_waited_for"]),
    "choices of one call": Row(f"{B.choices_max}", [f"{OPENAI}::test_the_choices_of_all_prompts_together_are_bounded"]),
    "a call's whole life": Row(
        f"{B.call_s_max:g} s, or less if its client says so",
        [
            f"{WIRE}::test_the_deadline_ends_an_answer_wherever_it_is_and_the_server_sees_it",
            f"{RETRIES}::test_nothing_is_begun_once_the_time_is_up",
            f"{METER}::test_a_client_that_never_reads_is_not_waited_for_beyond_the_deadline",
            "gateway/test_patience.py::test_what_is_left_of_a_call_is_believed_up_to_the_gateway_s_own_bound",
        ],
    ),
    "first byte, from one replica": Row(
        f"{default(Model, 'first_byte_s_max'):g} s",
        [
            f"{WIRE}::test_silence_before_an_answer_that_must_begin_soon_is_no_patience",
            "e2e/test_outage.py::test_an_engine_that_hangs_holds_no_stream_if_there_is_another",
        ],
    ),
    "calls waiting for a model": Row(
        f"{default(Model, 'waiting_max')}, {default(Model, 'wait_s_max'):g} s",
        [
            "gateway/test_fairness.py::test_a_full_line_refuses_and_says_when_to_come_back",
            "gateway/test_fairness.py::test_waiting_too_long_is_given_up_and_leaks_no_place",
        ],
    ),
    "calls at an engine": Row(
        "its slots",
        ["e2e/test_overload.py::test_what_fits_is_served_and_the_rest_refused_before_any_of_it_is_done"],
    ),
    "replicas asked after one that failed": Row(
        f"{target.RETRIES_PER_CALL:g} a call, and {target.RETRIES_PER_S:g} a second; "
        f"saved up to {target.RETRIES_KEPT:g}",
        [f"{RETRIES}::test_in_any_run_of_calls_and_pauses_no_more_is_given_than_was_earned"],
    ),
    "calls waiting for a connection": Row(
        f"{wire.WAITING_MAX:,}, and the call's deadline",
        [
            f"{HERE}::test_calls_that_wait_for_a_connection_are_bounded",
            f"{WIRE}::test_calls_beyond_the_places_wait_in_order_and_no_longer_than_their_deadline",
        ],
    ),
    "connecting; silence": Row(
        f"{default(remote.Remote, 'connect_s_max'):g} s; {default(remote.Remote, 'idle_s_max'):g} s",
        [
            f"{WIRE}::test_connecting_is_bounded_by_its_own_limit_and_the_deadline",
            f"{WIRE}::test_silence_amid_an_answer_breaks_it",
        ],
    ),
    "a connection kept for the next call": Row(
        f"{wire.PARKED_S_MAX:g} s", [f"{WIRE}::test_parked_connections_close_by_themselves"]
    ),
    "an engine's header": Row(
        f"{kib(upstream.HEAD_BYTES_MAX)}, {upstream.HEADERS_MAX} fields",
        [f"{WIRE}::test_a_flood_of_what_is_not_body_is_bounded"],
    ),
    "an engine's answer, read ahead": Row(
        f"{kib(upstream.AHEAD_BYTES_MAX)} and one read", [f"{WIRE}::test_a_slow_reader_makes_the_server_wait"]
    ),
    "calls waiting for ONNX Runtime": Row(
        f"{default(onnx.Onnx, 'waiting_max')}",
        ["runtimes/test_onnx.py::test_one_call_more_than_may_wait_is_refused"],
    ),
    "a batch: rows, tokens": Row(
        f"{batch.BATCH_MAX}, {batch.CELLS_PER_ROW} a row; {default(onnx.Onnx, 'delay_s_max'):g} s",
        [
            "runtimes/test_batch.py::test_a_batch_closes_by_size",
            "runtimes/test_batch.py::test_a_batch_closes_by_cells",
            "runtimes/test_batch.py::test_a_batch_closes_by_age",
        ],
    ),
    "rows in line of one call": Row(
        "those of two batches for each worker",
        ["runtimes/test_onnx.py::test_ten_thousand_rows_are_answered_in_their_order_and_few_of_them_wait_at_once"],
    ),
    "a message to or from Triton": Row(
        f"{mib(triton_client.MESSAGE_BYTES_MAX)}; {triton_client.SAID_CHARS_MAX} characters; "
        f"{triton_client.PROBE_S_MAX:g} s",
        [
            f"{TRITON}::test_a_request_that_is_too_large_for_a_message_is_refused",
            f"{TRITON}::test_long_words_about_a_bad_request_are_cut",
            f"{TRITON}::test_a_server_that_does_not_say_whether_it_is_ready_is_not",
        ],
    ),
    "connecting to Triton": Row(
        f"{rpc_channel.CONNECT_S_MAX:g} s; {rpc_wire.KEEPALIVE_S:g} s; {rpc_wire.KEEPALIVE_S_MAX:g} s",
        [
            f"{RPC}::test_a_server_that_does_not_speak_http_2_cannot_be_reached",
            f"{RPC}::test_a_silent_server_is_asked_whether_it_lives_and_then_left",
        ],
    ),
    "requests to Triton that it does not read": Row(
        f"{mib(rpc_wire.UNREAD_BYTES_MAX)}; {kib(rpc_wire.HEADER_BYTES_MAX)}; {len(rpc_channel.UNSEEN_S)} times",
        [
            f"{RPC}::test_what_is_not_read_is_held_back",
            f"{RPC}::test_an_odd_answer_is_an_error_of_its_own",
            f"{RPC}::test_a_call_that_was_refused_unseen_is_sent_again",
        ],
    ),
    "rows of one message to Triton": Row(
        "its model's `max_batch_size`",
        [f"{TRITON}::test_more_rows_than_the_model_takes_go_in_pieces_and_come_back_in_order"],
    ),
    "a replica's faults": Row(
        f"{replica.FAILURES_MAX}; {replica.EJECTIONS_S[0]:g} to {replica.EJECTIONS_S[-1]:g} s",
        ["gateway/test_replica.py::test_it_stays_away_longer_each_time_and_never_for_ever"],
    ),
    "an engine's restarts": Row(
        f"{process.Limits().failures_max} failures in {process.Limits().failures_s:g} s",
        [f"{PROCESS}::test_after_too_many_failures_it_is_left_alone_and_then_tried_again"],
    ),
    "an engine's log": Row(
        mib(process.Limits().log_bytes_max), [f"{PROCESS}::test_the_log_has_a_bound_and_keeps_the_end"]
    ),
    "texts of one request": Row(
        f"{entries.ROWS_MAX:,}; {entries.IDS_MAX:,}",
        [
            f"{DIALECT}::test_more_entries_than_there_may_be_are_refused_with_both_numbers",
            f"{DIALECT}::test_a_short_body_cannot_ask_for_a_large_array",
        ],
    ),
    "those decoded": Row(
        f"{entries.WINDOW_ROWS}, or {kib(entries.WINDOW_BYTES)} padded to the longest",
        [f"{DIALECT}::test_rows_go_to_the_model_in_order_a_window_at_a_time"],
    ),
    "a predictor's answer": Row(
        kib(route.WHOLE_BYTES_MAX), ["gateway/test_series.py::test_a_long_answer_begins_before_it_is_whole"]
    ),
    "a message's tensors, or parameters": Row(
        f"{elements.NAMED_MAX}; {elements.RANK_MAX}, 2^{elements.ELEMENTS_MAX.bit_length() - 1}; "
        f"2^{elements.VALUES_MAX.bit_length() - 1}; {elements.STRINGS_MAX:,}; "
        f"2^{elements.LISTS_MAX.bit_length() - 1}; {elements.NAME_CHARS_MAX} characters; {elements.QUOTED_CHARS_MAX}",
        [
            f"{OIP}::test_what_can_t_be_understood_is_refused_by_name",
            f"{OIP}::test_a_body_takes_no_more_than_its_own_size_beside_it_before_it_is_refused",
        ],
    ),
    "lists, objects and commas of JSON": Row(
        f"{bounded.JSON_VALUES_MAX:,}; {protobuf.FIELDS_MAX:,}; {protobuf.NESTED_FIELDS_MAX:,}; "
        f"2^{elements.VALUES_MAX.bit_length() - 1}",
        [
            f"{OIP}::test_a_body_takes_no_more_than_its_own_size_beside_it_before_it_is_refused",
            f"{OIP}::test_a_message_is_counted_before_anything_is_made_of_it",
        ],
    ),
    "a sound": Row(
        f"{wav.CHUNKS_MAX}; {wav.CHANNELS_MAX}; its graph's",
        [
            "runtimes/test_wav.py::test_what_cannot_be_read_is_refused_with_the_reason",
            "runtimes/test_audio.py::test_what_is_no_such_file_is_refused_with_its_row",
        ],
    ),
    "what requests and answers of gRPC say": Row(
        f"{kserve_grpc.KNOWN_MAX}; {kserve_grpc.KNOWN_BYTES_MAX} bytes",
        [f"{OIP}::test_few_requests_and_answers_are_remembered"],
    ),
    "a compressed body": Row(
        f"as long as a plain one, {mib(B.body_bytes_max)}; {coding.MEMBERS_MAX}",
        [
            f"{KSERVE}::test_many_members_that_become_a_long_body_are_refused",
            f"{KSERVE}::test_a_short_body_that_becomes_a_long_one_is_refused",
            f"{GRPC}::test_a_short_message_that_becomes_a_long_one_is_refused",
        ],
    ),
    "a model's name": Row(
        f"{inference.MODEL_CHARS_MAX} characters", [f"{GRPC}::test_what_is_wrong_has_a_status_of_its_own"]
    ),
    "connections of gRPC": Row(
        f"{B.connections_max:,}; {B.connections_max:,}; {edge_grpc.STREAMS_MAX:,}; "
        f"{edge_grpc.WATCHERS_MAX}, {edge_grpc.WATCHERS_EACH_MAX}",
        [
            f"{GRPC}::test_connections_are_bounded_and_then_free_again",
            f"{GRPC}::test_calls_of_all_connections_are_bounded",
            f"{GRPC}::test_calls_of_one_connection_are_bounded_and_the_others_wait",
            f"{GRPC}::test_watchers_are_bounded_because_they_need_no_key",
            f"{GRPC}::test_one_connection_cannot_take_all_places_of_watchers",
        ],
    ),
    "a message of gRPC": Row(
        f"{mib(B.body_bytes_max)}; {kib(edge_grpc.OPEN_BYTES_MAX)}; "
        f"{mib(grpc_call.LARGEST_UNREAD_MAX * B.body_bytes_max)}",
        [
            f"{GRPC}::test_what_is_wrong_has_a_status_of_its_own",
            f"{GRPC_WIRE}::test_a_message_that_needs_no_key_is_short",
            f"{GRPC_WIRE}::test_messages_that_do_not_end_hold_little_together",
        ],
    ),
    "a connection of gRPC, or a stream": Row(
        f"{edge_grpc.IDLE_S_MAX:g} s; {edge_grpc.KEEPALIVE_S:g} s; {edge_grpc.KEEPALIVE_S_MAX:g} s",
        [
            f"{GRPC}::test_an_idle_connection_is_closed",
            f"{GRPC}::test_a_stream_without_requests_is_ended",
            f"{GRPC_WIRE}::test_a_silent_connection_is_asked_whether_it_lives",
        ],
    ),
    "what HTTP/2 lets a peer send ahead": Row(
        f"{kib(http2_stream.AHEAD_BYTES_MAX)}; {reader.PARTS_MORE_MAX}",
        [
            f"{HTTP2}::test_who_does_not_take_it_holds_up_the_stream_and_not_the_connection",
            f"{HTTP2}::test_a_header_without_end_ends_the_connection",
        ],
    ),
    "HTTP/2's frames that bring nothing": Row(
        f"{http2.IDLE_FRAMES_MAX:,}, {http2.IDLE_FRAMES_PER_S}, and {http2.IDLE_FRAMES_EACH} for each frame that "
        f"brings something; {http2.RESETS_MAX:,}, {http2.RESETS_PER_S}",
        [
            f"{HTTP2}::test_frames_that_bring_nothing_are_put_up_with_only_for_so_long",
            f"{HTTP2}::test_streams_that_are_opened_and_reset_are_counted",
        ],
    ),
    "an engine's frames of HTTP/2 that bring nothing": Row(
        f"{http2.SERVER_IDLE_FRAMES_MAX:,}, {http2.IDLE_FRAMES_PER_S}, {http2.SERVER_IDLE_FRAMES_EACH}",
        [
            f"{HTTP2}::test_a_server_may_not_say_what_brings_nothing_for_ever",
            f"{HTTP2}::test_calls_that_end_early_all_at_once_do_not_trip_the_bound",
        ],
    ),
    "streams that ended early": Row(
        f"{http2.LEFT_MAX:,}; {http2.LATE_FRAMES_MAX}; {fields.KNOWN_MAX}",
        [
            f"{HTTP2}::test_of_streams_that_ended_early_the_last_are_remembered",
            f"{HTTP2}::test_refused_calls_with_long_messages_do_not_cost_the_connection",
            f"{HTTP2}::test_frames_that_bring_nothing_are_put_up_with_only_for_so_long",
            f"{HTTP2}::test_few_header_blocks_are_remembered",
        ],
    ),
    "a refusal, waiting": Row(
        f"{grpc_call.REFUSE_S_MAX:g} s; {grpc_call.GRACE_S:g} s",
        [
            f"{GRPC_WIRE}::test_a_refusal_waits_a_moment_for_the_message_and_no_longer",
            f"{GRPC_WIRE}::test_a_call_s_deadline_ends_what_only_waits",
        ],
    ),
    "words whose tokens are kept": Row(
        f"{words.WORDS_MAX:,}; {words.WORD_CHARS_MAX} characters",
        [f"{WORDS}::test_words_are_forgotten_rather_than_too_many"],
    ),
    "texts made ahead": Row(
        f"{texts.UNSENT_MAX}, {B.write_s_max:g} s",
        [
            f"{GRPC}::test_texts_that_nobody_takes_make_the_engine_wait",
            f"{GRPC}::test_who_does_not_read_is_given_up_and_frees_the_engine",
        ],
    ),
    "an error's message over gRPC": Row(
        f"{edge_grpc.MESSAGE_CHARS_MAX:,} characters", [f"{GRPC}::test_a_long_message_is_cut"]
    ),
    "an answer that is not streamed": Row(
        f"{mib(meter.ANSWER_BYTES_MAX)}, {mib(stream.EVENT_BYTES_MAX)}",
        [f"{METER}::test_an_answer_has_a_bound", f"{METER}::test_an_event_has_a_bound"],
    ),
    "copies of a name's versions": Row(
        f"{remote_shelf.CACHED_MAX} and those of an hour; {remote_shelf.TRIES_MAX}",
        [
            "runtimes/test_remote_shelf.py::test_only_the_copies_opened_last_are_kept",
            "runtimes/test_remote_shelf.py::test_a_change_that_others_are_always_faster_with_is_given_up",
        ],
    ),
    "an engine that does not end": Row(
        f"{meter.AFTER_END_S_MAX:g} s", [f"{METER}::test_an_engine_that_does_not_hang_up_keeps_nobody"]
    ),
    "an engine's error:": Row(
        f"{failure.PLAIN_ERROR_BYTES_MAX:,} bytes; 64 characters of a name; 0 to {tokens.TOKENS_MAX:,}",
        [
            f"{METER}::test_a_long_plain_error_is_cut",
            f"{METER}::test_a_code_that_is_no_name_is_replaced_so_that_no_prompt_is_recorded",
            f"{METER}::test_counts_that_can_t_be_true_are_as_if_not_said",
        ],
    ),
    "records not yet on disk": Row(
        mib(journal.UNWRITTEN_BYTES_MAX), [f"{JOURNAL}::test_past_the_bound_calls_are_refused_and_then_taken_again"]
    ),
    "records at hand": Row(
        f"{journal.RECENT_MAX:,}", [f"{JOURNAL}::test_records_that_are_too_many_to_be_kept_at_hand_are_read_back"]
    ),
    "a journal segment": Row(
        f"{mib(journal.SEGMENT_BYTES_MAX)}; {mib(journal.LINE_BYTES_MAX)}",
        [
            f"{JOURNAL}::test_a_grown_segment_is_replaced",
            f"{JOURNAL}::test_a_line_too_long_to_be_a_record_costs_only_itself",
        ],
    ),
    "calls to the store at once": Row(
        f"{sqlite.THREADS_MAX}, 5 s",
        ["contract/test_store.py::test_a_call_that_gets_no_thread_in_time_or_leaves_never_happens"],
    ),
    "a body where no key is asked for": Row(
        kib(request.KEYLESS_BODY_BYTES_MAX),
        ["gateway/test_openai.py::test_nobody_reads_much_from_who_has_shown_no_key"],
    ),
    "a key as it is presented": Row(
        f"{key.KEY_CHARS_MAX} characters", ["gateway/test_tenant.py::test_an_endless_key_is_not_even_summed"]
    ),
    "quota holders kept": Row(
        f"{quota.HOLDERS_KEPT:,}", ["gateway/test_quota.py::test_holders_that_are_idle_are_forgotten"]
    ),
    "tenants and keys that several workers": Row(
        f"{counters.ENTRIES:,}",
        [
            "gateway/test_counters.py::test_an_idle_entry_gives_way_to_another",
            "gateway/test_counters.py::test_nobody_is_let_in_uncounted",
            "gateway/test_counters.py::test_who_spent_something_keeps_its_entry_until_the_month_is_over",
            "gateway/test_counters.py::test_more_spenders_than_there_is_room_for_are_refused_at_the_start",
        ],
    ),
    "connections that a worker takes at once": Row(
        f"{acceptor.TAKE_MAX}", ["gateway/test_acceptor.py::test_what_comes_at_once_is_shared_evenly"]
    ),
    "a worker's answer": Row(
        f"{workers.ANSWER_S_MAX:g} s; {workers.LOOKS_MISSED_MAX} times, which takes 30 s",
        ["e2e/test_workers.py::test_a_worker_that_does_not_answer_is_said_and_the_others_serve"],
    ),
    "a worker's wait for its replicas": Row(
        f"{plane.LOOKED_AT_S_MAX:g} s",
        ["e2e/test_workers.py::test_a_worker_takes_calls_over_grpc_though_an_engine_does_not_say_how_it_is"],
    ),
    "a worker's restart": Row(
        f"after {workers.RESTART_S:g} to {workers.RESTART_S_MAX:g} s",
        ["e2e/test_workers.py::test_a_killed_worker_is_started_again_and_leaves_nothing_taken"],
    ),
    "the admin API": Row(
        f"{kib(admin.BODY_BYTES_MAX)}; {admin.STORE_S_MAX:g} s",
        ["gateway/test_admin.py::test_what_is_wrong_is_told_in_one_shape"],
    ),
    "spans on their way": Row(
        f"OpenTelemetry's 2,048; {plane.TRACE_EXPORT_S_MAX:g} s a try",
        ["e2e/test_trace_export.py::test_a_collector_that_is_gone_costs_no_call"],
    ),
    "labels of metrics": Row(
        "the configured models, fixed codes",
        ["gateway/test_trace.py::test_labels_are_no_client_s_or_engine_s_free_choice"],
    ),
    "stopping:": Row(
        f"{default(Server, 'drain_s_max'):g} s; {server.CLOSE_S_MAX:g} s",
        [
            f"{DRAIN}::test_of_two_hundred_streams_all_that_end_in_the_grace_end_well_and_the_rest_are_told",
            f"{CONNECTION}::test_stopping_lets_what_is_under_way_end_and_closes_the_rest",
        ],
    ),
}

#: Bounds of the code that are none of a queue, a buffer or a wait: a unit of work, a value's range, a file's.
OF_VALUES = {
    "PORT_MAX", "LABEL_CHARS_MAX", "GLOB_CHARS_MAX", "LIFETIME_S_MAX", "LIMIT_MAX", "WEIGHT_MAX", "READ_BYTES_MAX",
    "PRICE_MAX", "NANO_MAX", "WORD_MAX", "TOKENS_OUT_MAX",
    "_FILES_MAX", "_JSON_BYTES_MAX", "JOIN_BYTES_MAX", "LOOK_S_MAX", "ENVIRONMENT_KEPT", "_PROMPTS_MAX", "READY_S_MAX",
    "REOPEN_S_MAX", "SOCKET_BYTES_MAX", "_MOVES_MAX", "_MANIFEST_BYTES_MAX", "CHARS_PER_TOKEN_MAX",
    "_HEADER_BYTES_MAX", "_CONFIG_BYTES_MAX", "LOAD_S_MAX",
    "FRAME_BYTES_MAX", "LENGTH_DIGITS_MAX", "SIZE_MAX", "UNCOUNTED_BYTES_MAX",
}  # fmt: skip


def rows() -> dict[str, str]:
    """What the table has: the first two cells of each row."""
    cells = [line.strip("|").split("|") for line in TABLE.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1].strip() for row in cells if row[0].strip() != "what"}


@pytest.mark.parametrize("what", ROWS)
def test_a_bound_is_in_the_table_as_it_is_in_the_code(what: str) -> None:
    found = {name: bound for name, bound in rows().items() if name.startswith(what)}
    assert list(found.values()) == [ROWS[what].says]


def test_the_table_has_no_other_rows() -> None:
    assert [name for name in rows() if not any(name.startswith(what) for what in ROWS)] == []


@pytest.mark.parametrize("test", [test for row in ROWS.values() for test in row.tests])
def test_a_bound_is_reached_by_a_test_that_there_is(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_no_bound_of_the_code_is_left_out() -> None:
    own = Path(__file__).read_text()
    files = [path for package in ("gateway", "runtimes") for path in (ROOT / package).rglob("*.py")]
    named = {
        name
        for path in files
        for name in re.findall(r"^(_?[A-Z][A-Z_]*(?:_MAX|_KEPT))\b", path.read_text(), re.MULTILINE)
    }
    assert {name for name in named - OF_VALUES if f".{name}" not in own} == set()
    assert OF_VALUES - named == set()


@pytest.mark.parametrize("struct", [Model, Server, call.Bounds, *Spec.__args__], ids=lambda struct: struct.__name__)
def test_whatever_a_configuration_bounds_has_a_default(struct: type) -> None:
    fields = [it for it in msgspec.structs.fields(struct) if it.name.endswith("_max")]
    assert [it.name for it in fields if it.default is msgspec.NODEFAULT] == []


def test_vllm_and_remote_agree_on_what_silence_is() -> None:
    assert default(vllm.Vllm, "idle_s_max") == default(remote.Remote, "idle_s_max")
