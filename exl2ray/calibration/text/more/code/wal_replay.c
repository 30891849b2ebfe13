/*-------------------------------------------------------------------------
 *
 * wal_replay.c
 *	  Redo of the write-ahead log after an unclean shutdown.
 *
 * The log is a sequence of segments of 4 MB.  A record never crosses a
 * segment boundary: if it does not fit, the remainder is filled with a pad
 * record and the next segment starts with the record proper.
 *
 * Redo starts at the checkpoint named in the control file and stops at the
 * first record whose CRC or back-link is wrong.  That is the normal way for
 * a log to end; it is only suspicious when a *later* segment exists whose
 * first record is newer, because then something in the middle got lost.
 *
 *-------------------------------------------------------------------------
 */
#include "kestrel.h"

#include "access/bufpage.h"
#include "access/rmgr.h"
#include "storage/fd.h"
#include "utils/crc32c.h"
#include "utils/elog.h"

typedef struct WalRecord
{
	uint32		total_len;		/* of header and payload */
	uint32		crc;			/* of everything after this field */
	LogPtr		prev;			/* start of the previous record */
	TxnId		txn;
	uint8		rmid;			/* which resource manager owns it */
	uint8		info;			/* for the resource manager's own use */
	uint16		nblocks;		/* block references that follow */
} WalRecord;

#define MIN_RECORD_LEN	sizeof(WalRecord)
#define CRC_START		offsetof(WalRecord, prev)

typedef enum
{
	READ_OK,
	READ_END,
	READ_TORN
} ReadResult;

static char *segbuf;
static uint32 segno_loaded = INVALID_SEGNO;

static bool
load_segment(uint32 segno)
{
	char		path[MAXPATHLEN];
	File		file;
	int			nread;

	if (segno == segno_loaded)
		return true;

	snprintf(path, sizeof(path), "%s/wal/%08X", DataDir, segno);
	file = PathOpen(path, O_RDONLY | BINARY_FLAG);
	if (file < 0)
	{
		if (errno != ENOENT)
			elog(FATAL, "could not open log segment \"%s\": %m", path);
		return false;
	}

	nread = FileReadAll(file, segbuf, WAL_SEG_SIZE);
	FileClose(file);

	/*
	 * The last segment may be short if the machine went down while it was
	 * being preallocated.  Zeroes never look like a record.
	 */
	if (nread < WAL_SEG_SIZE)
		memset(segbuf + nread, 0, WAL_SEG_SIZE - nread);

	segno_loaded = segno;
	return true;
}

static ReadResult
read_record(LogPtr at, LogPtr expected_prev, WalRecord **out)
{
	uint32		off = LogPtrOffset(at);
	WalRecord  *rec;
	uint32		crc;

	if (!load_segment(LogPtrSegno(at)))
		return READ_END;
	if (off + MIN_RECORD_LEN > WAL_SEG_SIZE)
		return READ_END;

	rec = (WalRecord *) (segbuf + off);
	if (rec->total_len == 0)
		return READ_END;
	if (rec->total_len < MIN_RECORD_LEN || rec->total_len > WAL_SEG_SIZE - off)
		return READ_TORN;

	INIT_CRC32C(crc);
	COMP_CRC32C(crc, (char *) rec + CRC_START, rec->total_len - CRC_START);
	FIN_CRC32C(crc);
	if (crc != rec->crc)
		return READ_TORN;

	/*
	 * A recycled segment is full of perfectly valid records of an earlier
	 * life.  Only the back-link tells them from ours.
	 */
	if (rec->prev != expected_prev)
		return READ_END;

	*out = rec;
	return READ_OK;
}

/*
 * ReplayLog --- apply every record from 'start' on.
 *
 * Returns the position at which new records are to be written.  '*last'
 * receives the position of the last record applied.
 */
LogPtr
ReplayLog(LogPtr start, LogPtr start_prev, LogPtr *last)
{
	LogPtr		at = start;
	LogPtr		prev = start_prev;
	WalRecord  *rec;
	ReadResult	res;
	uint64		applied = 0;
	uint64		skipped = 0;

	segbuf = MemoryAllocAligned(TopContext, WAL_SEG_SIZE, BLCKSZ);

	elog(LOG, "redo starts at %X/%08X", LogPtrSegno(at), LogPtrOffset(at));

	while ((res = read_record(at, prev, &rec)) == READ_OK)
	{
		const ResourceManager *rm;

		CHECK_FOR_INTERRUPTS();

		if (rec->rmid > RM_MAX_ID)
			elog(PANIC, "unknown resource manager %d at %X/%08X",
				 rec->rmid, LogPtrSegno(at), LogPtrOffset(at));
		rm = &RmgrTable[rec->rmid];

		/*
		 * Each redo routine compares the page's own LSN with ours and does
		 * nothing if the page already has the change.  That makes replay
		 * idempotent, so that dying here is no worse than dying anywhere.
		 */
		if (rm->redo(at, rec))
			applied++;
		else
			skipped++;

		prev = at;
		at = LogPtrAdvance(at, MAXALIGN(rec->total_len));
		if (WAL_SEG_SIZE - LogPtrOffset(at) < MIN_RECORD_LEN)
			at = LogPtrNextSegment(at);
	}

	if (res == READ_TORN)
		elog(LOG, "incomplete record at %X/%08X, taking it as the end of the log",
			 LogPtrSegno(at), LogPtrOffset(at));

	if (load_segment(LogPtrSegno(at) + 1) && segment_is_newer(segbuf, prev))
		ereport(FATAL,
				(errcode(ERRCODE_DATA_CORRUPTED),
				 errmsg("log is damaged in the middle, at %X/%08X",
						LogPtrSegno(at), LogPtrOffset(at)),
				 errhint("Restore from a base backup, or start with "
						 "ignore_log_gap = on if you accept the loss.")));

	elog(LOG, "redo done at %X/%08X: " UINT64_FORMAT " records applied, "
		 UINT64_FORMAT " were already on disk",
		 LogPtrSegno(prev), LogPtrOffset(prev), applied, skipped);

	MemoryFree(segbuf);
	segno_loaded = INVALID_SEGNO;
	*last = prev;
	return at;
}
