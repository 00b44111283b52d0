"""Hundreds of rounds while sites come, go and die: does any process, or any folder, grow with time?

    python -m benchmarks.soak                                        five minutes
    python -m benchmarks.soak --minutes 600 --out benchmarks/records/soak/NAME

A federation of real processes trains a tiny model. One site stays; one is killed and comes back, one leaves and comes
back, and guests are invited, take part for a while and leave. All the time memory, open files and threads of every
process and the size of every folder are written down. Written are OUT.json, with all figures and a verdict for each,
and OUT.svg, the same as curves. It ends with exit code 1 unless all that should stay flat has stayed flat.
"""
