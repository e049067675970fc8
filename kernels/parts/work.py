"""Work items: a span of KV tiles of one request.  kernels/schedule.py writes them, every role walks the same sequence."""

from dataclasses import dataclass, fields

import cutlass.cute as cute
from cutlass import Int32

from .ptx import uniform

RECORD = 8  # int32 per record: the fields of WorkItem, then zeros
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
    """the items of this CTA"""

    records: cute.Tensor  # gmem, (item, RECORD)
    count: Int32

    @classmethod
    def of(cls, mItems, mPartBegin, part):
        begin = uniform(mPartBegin[part])
        return cls(cute.domain_offset((begin, 0), mItems), uniform(mPartBegin[part + 1]) - begin)
