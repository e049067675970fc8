"""Work items: a span of KV tiles of one request.  kernels/schedule.py writes them, every role walks the same sequence."""

from dataclasses import dataclass, fields

import cutlass.cute as cute
from cutlass import Int32

from .ptx import lane_value, uniform

RECORD = 8  # int32 per record: the fields of WorkItem, then BEGIN and COUNT in a part's record, zeros in an item's
BEGIN, COUNT = 5, 6
MERGE = 4  # int32 per request to merge: request, first slot, number of pieces (0: no tokens), 0


@dataclass(frozen=True)
class WorkItem:
    batch: Int32
    first: Int32  # tiles first .. end - 1
    end: Int32
    slot: Int32  # where the partial result goes, or -1: the item is the whole request, its result is final
    seqlen: Int32

    @classmethod
    def read(cls, sRecord):
        return cls(*(uniform(sRecord[i]) for i in range(len(fields(cls)))))


@dataclass(frozen=True)
class Work:
    """The items of this CTA.  A part's record is that of its first item, where its items begin, and how many they are: one load
    at the kernel's start, where every dependent load is 0.4 us of batch 1's 12."""

    records: cute.Tensor  # gmem, (item, RECORD)
    head: Int32  # per lane: field lane % RECORD of the first item's record
    count: Int32

    @classmethod
    def of(cls, mItems, mParts, part):
        head = mParts[part, cute.arch.lane_idx() % RECORD]
        begin, count = uniform(lane_value(head, BEGIN)), uniform(lane_value(head, COUNT))
        return cls(cute.domain_offset((begin, 0), mItems), head, count)
