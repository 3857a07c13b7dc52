"""The report's prose: what each bench measures, and how its numbers are to be read."""

from __future__ import annotations

from collections.abc import Collection

# bench: (heading, what it measures)
BENCHES = {
    "ttft": (
        "Time to first token",
        "How long a request waits for its first token when its prompt holds memories: computed in full, "
        "found again as an exact prefix, or spliced from stored records in an order that no earlier prompt "
        "had.",
    ),
    "decode": (
        "Decode",
        "Time for each further token, at a context and a batch size. Decoding one sequence is reading: "
        "weights and KV pages once a token, so the memory's bandwidth sets a floor.",
    ),
    "quality": (
        "Quality",
        "What splicing costs: how far the answers' token distributions lie from those of a full prefill in "
        "fp32 (KL divergence), and how often answers are still right, against the share of memory tokens "
        "computed again.",
    ),
    "kernels": (
        "Kernels",
        "Single operations against the machine's ceilings, ours beside other backends on the same shapes.",
    ),
    "roofline": (
        "Roofline",
        "The ceilings of this machine, measured: arithmetic, memory, disk and transfers. Every share of the "
        "limit in this report refers to such numbers.",
    ),
    "load": (
        "Load",
        "Many requests at once. Open loop: requests arrive at random (Poisson) at a given rate, whether or "
        "not earlier ones are done. Closed loop: each client waits for its answer before it asks again.",
    ),
    "paper-table5": (
        "The paper's Table 5",
        "The cells of Table 5 of “MemOS: A Memory OS for AI System” (arXiv 2507.03724), measured here: time "
        "to first token with the memory computed directly and with its KV record, and after how many uses "
        "the record has paid for its building.",
    ),
    "memory": (
        "Peak memory",
        "What a process takes that remembers, prefills, stores, splices and answers, in MB.",
    ),
    "attach": (
        "Attached models",
        "A whole generate() call of a Hugging Face model: attached over an empty store, without a store, "
        "on the engine alone, and by transformers itself, in turn on the same weights.",
    ),
    "int8": (
        "Weights of eight bits",
        "What rounding the weights that decoding reads costs: the likelihood of real text, token by token, "
        "and how far the distributions lie from those of whole weights.",
    ),
    "lora": (
        "Adapters",
        "Decoding with a LoRA for each request beside decoding without, and PEFT, in turn; what reading the "
        "adapters' bytes alone would take at the bandwidth measured in the same run; and how long it takes "
        "until another adapter is in place.",
    ),
    "retrieval": (
        "Retrieval",
        "Of the turns of a long dialogue that hold a question's evidence, how many are among the first 5 or "
        "10 found, and how early the first one comes (MRR). Each turn is a memory; no language model has a "
        "say. Our weights were chosen on the half of the dialogues that they are not scored on, except in "
        "the rows of the weights as shipped.",
    ),
    "need": (
        "Which memories are needed",
        "The probability that an answer needs a memory, given its cosine, relevance and rank: fitted on "
        "every other dialogue of LoCoMo and scored on the ones between, beside the numbers that the "
        "scheduler is shipped with.",
    ),
    "distraction": (
        "What memories that are not needed cost",
        "Answers behind the first few memories that retrieval finds, as full prefill: a decoder that reads "
        "more answers worse. The scheduler's distraction was fitted on every other dialogue of LoCoMo and is "
        "checked on the ones between.",
    ),
    "planner": (
        "Planning",
        "How long the memory scheduler takes to plan, and how far its plan may be from the best, by number "
        "of candidates.",
    ),
    "budget": (
        "Answers within a time",
        "Questions of many users about their memories, each with a time by which the first token is due. The "
        "memory scheduler chooses which memories enter and in which form; fixed policies are cut off where "
        "the same cost model says that the time ends.",
    ),
    "budget-simulated": (
        "Answers within a time, simulated",
        "The same scheduler in simulated time, under loads that this machine could never make: a thousand "
        "requests a second over a million memories, on a machine that is not as the scheduler was told. And "
        "what lies in memory kept by value, against LRU, LFU and others.",
    ),
    "steady": (
        "Steady state",
        "Hundreds of requests, one after the other, each a new question over memories in an order that no "
        "earlier one had, with host memory for half of the records: whether the last hundred get their first "
        "token as fast as the first. Then as many answers again and again at once, and whether any record is "
        "another than before.",
    ),
    "store": (
        "The store",
        "What keeping memories costs as they grow in number: adding one so that it survives a power cut, "
        "beside the fsync that nobody can do without; searching and reading through access control, also as "
        "of the past; opening the store; bytes on disk.",
    ),
    "compare": (
        "Comparison of two results",
        "Row by row: the later run over the earlier. A verdict is given only where the whole 95 % interval "
        "stands on one side of the tolerance.",
    ),
}

# (needed if one of these benches is there; empty: always), term, explanation
READING: tuple[tuple[frozenset[str], str, str], ...] = (
    (
        frozenset(),
        "Median and P95",
        "Each time is the median (P50) of n measured rounds after warm-up; 95 of 100 rounds are no slower "
        "than P95. With fewer than 20 rounds P95 is little more than the slowest.",
    ),
    (
        frozenset(),
        "Ratios before milliseconds",
        "Systems take turns within one run, so that what the machine does meanwhile meets all of them. "
        "Their ratios are steady where times drift: compare within a table, not across reports.",
    ),
    (
        frozenset(),
        "Intervals",
        "Intervals are 95 % bootstrap intervals. “Level” means that the interval of the ratio holds 1: this "
        "run cannot tell who is faster. Where a row has no samples, less than 5 % counts as level.",
    ),
    (
        frozenset({"ttft", "decode", "kernels"}),
        "Share of the limit",
        "The time that this machine's measured ceilings allow at least, divided by the time taken. 100 % "
        "leaves nothing to gain; formulas are in docs/benchmarks.md.",
    ),
    (
        frozenset({"ttft", "load"}),
        "Scopes",
        "Engine scope: token ids in, first token out, records waiting in memory. Request scope adds "
        "tokenisation, retrieval, fetching and splicing: what a user waits for.",
    ),
    (
        frozenset({"ttft"}),
        "What is reused",
        "“Exact prefix” needs the memories at the head of the prompt in the order of an earlier one; the "
        "question may be new. “Spliced” takes memories in any order and splices them anew for each request; "
        "with several it is an approximation, whose price the quality bench tells. “Question alone” answers "
        "without the memory: no way of using it can be faster.",
    ),
    (
        frozenset({"ttft"}),
        "Tiers",
        "Where a record lies when the request begins: host memory; disk with its pages in the page cache "
        "(warm); disk with the page cache emptied of it (cold).",
    ),
    (
        frozenset({"quality"}),
        "KL and the noise floor",
        "0 nats means the same distribution at every token. The noise floor is what rounding to bf16 alone "
        "does to a full prefill: below it, a method cannot be told from rounding.",
    ),
    (
        frozenset({"steady"}),
        "Records that stay",
        "Changed, added and written count records of the store, by the SHA-256 of their files and by the "
        "rows that name them, from before the first request to after the last: each should be 0. A store "
        "that keeps what requests computed would grow, and fit the orders it was made in.",
    ),
    (
        frozenset({"need"}),
        "Honest probabilities",
        "Log loss is in nats, lower is better, beside that of a model that gives every candidate the same "
        "probability. The calibration error is how far predicted probabilities lie from observed shares, in "
        "the mean over ten bins of as many candidates.",
    ),
    (
        frozenset({"budget", "budget-simulated"}),
        "Time kept, time foreseen",
        "Kept: the share of requests whose first token came within the budget. The error of the forecast is "
        "the median distance of the time foreseen, when the plan was made, from the time taken. A request is "
        "excluded where the bare query alone, without retrieval and memories, takes longer than the budget.",
    ),
    (
        frozenset({"load"}),
        "Goodput",
        "Requests a second whose first token came within the objective. Throughput without an objective "
        "says little about waiting.",
    ),
    (
        frozenset(),
        "Rows without numbers",
        "A system that is not installed, refused, crashed or ran out of time is listed with its reason; it "
        "is never counted as slower.",
    ),
)


def heading(bench: str) -> str:
    return BENCHES[bench][0] if bench in BENCHES else bench.replace("_", " ").replace("-", " ").capitalize()


def lead(bench: str) -> str:
    return BENCHES[bench][1] if bench in BENCHES else ""


def reading(benches: Collection[str]) -> list[tuple[str, str]]:
    """The explanations that concern these benches."""
    return [(term, text) for needed, term, text in READING if not needed or needed & set(benches)]
