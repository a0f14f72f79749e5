"""Does the cap hold on this machine?  Child processes under limits, watched and compared.

`child` is what runs inside a limit, `confine` the limit and the watcher outside, `cases` what is
run and what counts as a breach.  `flashllm stress` prints the table.
"""
