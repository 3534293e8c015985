"""New weights to the engine after every optimizer step, in memory, while it generates.

    trainer.export_adapter ──▶ ticket ──▶ engine.publish ──▶ slot of `policy-v17`
        (flat tensor in the       (a few kB)    (digest of the slot = digest of the ticket, or the run stops)
         GPU's or shared memory)

A policy version is immutable and has its own slot. A group leases the version that it begins with and finishes on it, unless
`--refit.in_flight` lets requests move on; a version whose last lease has ended is retired at the next publish.
"""
