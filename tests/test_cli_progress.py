"""Progress and footer: heartbeats without a terminal, a line that says what it must."""

from __future__ import annotations

import io

from flashllm.cli.footer import Footer, status_line
from flashllm.cli.progress import HEARTBEAT_S, Progress


def test_a_heartbeat_every_ten_seconds_and_not_more():
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream=stream, clock=lambda: now[0])
    for second in range(0, 31):
        now[0] = float(second)
        progress(second, 60, "load")
    lines = stream.getvalue().splitlines()
    assert len(lines) == int(30 / HEARTBEAT_S)
    assert lines[0] == "load: 17 % (10 of 60 B), 50 s left"


def test_a_new_label_starts_afresh_and_prompts_count_tokens():
    now, stream = [0.0], io.StringIO()
    progress = Progress(stream=stream, clock=lambda: now[0])
    progress(0, 10, "load")
    now[0] = 9.0
    progress(1, 4, "prompt")
    now[0] = 19.0
    progress(2, 4, "prompt")
    assert stream.getvalue() == "prompt: 50 % (2 of 4 tok), 10 s left\n"


def test_status_line():
    flash = {"rss": 231 << 20, "hit_rate": 0.71, "bytes_read": 42 * 38 << 20, "stall_ms": 6200.0}
    assert status_line(42, 10.0, flash, 256 << 20) == (
        "42 tok | 4.2 tok/s | RAM 231/256 MiB | hit 71 % | 38.0 MiB/token | wait 62 %"
    )
    assert "hit - %" in status_line(0, 0.0, {}, 1 << 20)


def test_a_footer_without_a_terminal_speaks_every_ten_seconds():
    now, stream = [0.0], io.StringIO()
    with Footer(stream=stream, clock=lambda: now[0]) as footer:
        for second in range(25):
            now[0] = float(second)
            footer.show(f"at {second}")
    assert stream.getvalue() == "\n[at 10]\n\n[at 20]\n"
