"""FFNs of which every token needs all: walked by neurons (bundles) or by rows."""

from __future__ import annotations

import numpy as np

from ..kernels.base import ATTENTION, FFN, PieceView


class DenseFFN:
    """The part of a DecoderModel that computes whole FFNs (x is [T, hidden_size], normed)."""

    def apart_ffn(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        """FFN without natural sparsity whose deciding rows lie apart, for the sake of approximate
        mode: all of it."""
        prefix = f"layers.{layer}."
        decided = self.scratch.view("decided", x.shape[0], self.config.intermediate_size)
        self.clock.phase = FFN
        self.linear(prefix + "deciding", x, decided, bias=self._deciding_bias(layer))
        if self.observer is not None:
            self.observer(layer, x, decided)
        self._prepare_up(layer, x)
        out.fill(0.0)
        for lease in self.store.scan(prefix + "ffn"):
            ids = np.arange(lease.start, lease.stop, dtype=np.int32)
            self._add_neurons(layer, lease, ids, decided, out)
        self._add_bias(prefix + "ffn.bias", out)
        self.clock.phase = ATTENTION

    def dense_ffn(self, layer: int, x: np.ndarray, out: np.ndarray, plane: str = "ffn") -> None:
        """FFN without natural sparsity: every bundle (gate | up | down, or up | down) is walked."""
        kernels, prefix, n_tokens = self.kernels, f"layers.{layer}.", x.shape[0]
        views = self.views[prefix + plane]
        first = "gate" if "gate" in views else "up"
        self.clock.phase = FFN
        kernels.prepare(self.activations, x, views[first])
        kernels.clear(out)
        leases = self.store.scan(prefix + plane)
        if n_tokens == 1 and prefix not in self._inner_biases:
            pieces = (views[first], views["up"] if first == "gate" else None, views["down"])
            for lease in leases:
                self._walk_neurons(pieces, lease.addresses, range(lease.start, lease.stop), out)
        else:
            self._add_bundles(prefix, plane, first, leases, out)
        self._add_bias(prefix + "ffn.bias", out)
        self.clock.phase = ATTENTION

    def ffn_by_rows(self, layer: int, x: np.ndarray, out: np.ndarray) -> None:
        """FFN without natural sparsity whose matrices lie by rows: dots all through."""
        prefix, n_tokens, n = f"layers.{layer}.", x.shape[0], self.config.intermediate_size
        self.clock.phase = FFN
        first, up = "up", None
        if self.config.gated:
            first, up = "gate", self.scratch.view("up", n_tokens, n)
        pre = self.scratch.view("decided", n_tokens, n)
        self.linear(prefix + first, x, pre, bias=f"{prefix}{first}.bias")
        if up is not None:
            self.linear(prefix + "up", x, up, bias=prefix + "up.bias")
        self.kernels.activate(self.config.activation, pre, up, pre)
        self.linear(prefix + "down", pre, out, bias=prefix + "ffn.bias")
        self.clock.phase = ATTENTION

    def _add_bundles(self, prefix: str, plane: str, first: str, leases, out: np.ndarray) -> None:
        """Add whole leases of bundles to `out`, operator by operator."""
        kernels, views, n_tokens = self.kernels, self.views[prefix + plane], out.shape[0]
        # Blocks of tokens are not bound by reading: no detour through `_paired_dots`.
        blocks = 0 < kernels.many <= n_tokens and views[first].quantised
        rows = self._gate_up_rows(prefix + plane) if first == "gate" and not blocks else None
        for lease in leases:
            up = None
            if rows is not None:
                view, every = rows
                ids = every[2 * lease.start : 2 * lease.stop]
                pre, up = self._paired_dots(view, lease.addresses, ids, n_tokens)
            else:
                ids = np.arange(lease.start, lease.stop, dtype=np.int32)
                pre = self._bundle_dots(views[first], lease, ids, "decided", n_tokens)
                if first == "gate":
                    up = self._bundle_dots(views["up"], lease, ids, "up", n_tokens)
            self._add_bias(f"{prefix}{first}.bias", pre, lease.start, lease.stop)
            if up is not None:
                self._add_bias(prefix + "up.bias", up, lease.start, lease.stop)
            kernels.activate(self.config.activation, pre, up, pre)
            kernels.accumulate_range(
                pre, lease.addresses, views["down"], lease.start, lease.stop, out
            )

    def _walk_neurons(self, pieces, addresses, items, out) -> None:
        """Add the neurons of a lease for one token, in one walk over their bundles."""
        pre = self.scratch.view("decided", 1, len(items))
        up = None if pieces[1] is None else self.scratch.view("up", 1, len(items))
        self.kernels.add_neurons(
            self.activations, addresses, pieces, items, self.config.activation, pre, up, out
        )

    def _gate_up_rows(self, plane: str) -> tuple[PieceView, np.ndarray] | None:
        """`_gate_up_view` and the ids of all gate and up rows, made once."""
        if plane not in self._paired:
            found = self._gate_up_view(plane)
            if found is not None:
                view, every = found
                k = np.arange(2 * self.planes[plane].n_items, dtype=np.int32)
                found = view, every * (k // 2) + k % 2
            self._paired[plane] = found
        return self._paired[plane]

    def _gate_up_view(self, plane: str) -> tuple[PieceView, int] | None:
        """A bundle plane seen as rows, where its pieces allow it: (view, rows of a bundle).

        Bundles of pieces of one length lie in memory as gate 0, up 0, down 0, gate 1, …: one call
        over rows 0, 1, 3, 4, … walks memory once and in order, where two calls would skip through
        it twice.  The dots are the same dots.
        """
        views, stride = self.views[plane], self.planes[plane].stride
        gate, up = views["gate"], views["up"]
        step = up.offset - gate.offset
        if gate.offset or step <= 0 or stride % step:
            return None
        if (gate.weight_type, gate.n_cols) != (up.weight_type, up.n_cols):
            return None
        every = stride // step
        return PieceView(gate.weight_type, gate.per_frame * every, step, 0, gate.n_cols), every

    def _paired_dots(
        self, view: PieceView, addresses: np.ndarray, ids: np.ndarray, n_tokens: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(gate, up) dots of rows `ids` of a view of `_gate_up_rows`."""
        n = ids.size // 2
        both = self.scratch.view("gate_up", n_tokens, 2 * n)
        self.kernels.dot_ids(self.activations, addresses, view, ids, both)
        pre, up = (self.scratch.view(name, n_tokens, n) for name in ("decided", "up"))
        np.copyto(pre, both[:, 0::2])
        np.copyto(up, both[:, 1::2])
        return pre, up
