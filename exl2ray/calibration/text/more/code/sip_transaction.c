/*
 * Lapwing -- a telephony server
 *
 * GPL version 2; the whole of it is in the file LICENSE.
 */

/*! \file
 *
 * \brief SIP server transactions, RFC 3261 section 17.2
 *
 * \par Locking
 * A transaction is an lw_obj: it is locked by lw_lock() and kept alive by
 * references. The container of transactions has its own lock, which is always
 * taken \b before that of a transaction. Timers hold a reference.
 *
 * \ingroup sip
 */

#include "lapwing.h"

#include "lapwing/lwobj.h"
#include "lapwing/logger.h"
#include "lapwing/sched.h"
#include "sip/message.h"
#include "sip/transaction.h"
#include "sip/transport.h"

#define T1_MS 500	/*!< Estimate of the round trip time */
#define T2_MS 4000	/*!< Retransmissions never slow down beyond this */
#define T4_MS 5000	/*!< How long a message may linger in the network */

/*! \brief States of INVITE and other server transactions in one set */
enum sip_st_state {
	ST_TRYING,
	ST_PROCEEDING,
	ST_COMPLETED,
	ST_CONFIRMED,
	ST_TERMINATED,
};

struct sip_server_tx {
	enum sip_st_state state;
	unsigned int is_invite:1;
	unsigned int reliable:1;	/*!< TCP or TLS underneath */
	struct sip_message *last;	/*!< The response to send again */
	struct sip_dest dest;
	int resend_id;			/*!< Timer G */
	int resend_ms;
	int expire_id;			/*!< Timer H, I or J, according to state */
	sip_tx_cb on_timeout;
	void *data;
	char branch[0];
};

static struct lw_container *transactions;
static struct lw_sched *sched;

static const char *state2str(enum sip_st_state state)
{
	static const char * const names[] = {
		[ST_TRYING] = "Trying",
		[ST_PROCEEDING] = "Proceeding",
		[ST_COMPLETED] = "Completed",
		[ST_CONFIRMED] = "Confirmed",
		[ST_TERMINATED] = "Terminated",
	};

	return state < LW_ARRAY_LEN(names) ? names[state] : "?";
}

static void tx_destroy(void *obj)
{
	struct sip_server_tx *tx = obj;

	lw_cleanup(tx->last);
	lw_debug(4, "Transaction %s gone\n", tx->branch);
}

/*! \note tx must be locked */
static void set_state(struct sip_server_tx *tx, enum sip_st_state state)
{
	lw_debug(3, "%s: %s -> %s\n", tx->branch, state2str(tx->state), state2str(state));
	tx->state = state;
}

static int expire_cb(const void *data)
{
	struct sip_server_tx *tx = (struct sip_server_tx *) data;
	int unacked;

	lw_lock(tx);
	tx->expire_id = -1;
	unacked = tx->is_invite && tx->state == ST_COMPLETED;
	set_state(tx, ST_TERMINATED);
	LW_SCHED_DEL_UNREF(sched, tx->resend_id, lw_unref(tx));
	lw_unlock(tx);

	lw_container_unlink(transactions, tx);

	/* Called without the lock: the user will want to hang up the channel. */
	if (unacked && tx->on_timeout) {
		lw_log(LOG_NOTICE, "No ACK for our final response, branch %s\n", tx->branch);
		tx->on_timeout(tx->data);
	}

	lw_unref(tx);
	return 0;
}

static int resend_cb(const void *data)
{
	struct sip_server_tx *tx = (struct sip_server_tx *) data;
	int next = 0;

	lw_lock(tx);
	if (tx->state == ST_COMPLETED) {
		sip_transport_send(&tx->dest, tx->last);
		next = tx->resend_ms = MIN(tx->resend_ms * 2, T2_MS);
	} else {
		tx->resend_id = -1;
	}
	lw_unlock(tx);

	if (!next) {
		lw_unref(tx);
	}
	return next;
}

/*! \note tx must be locked */
static void start_expiry(struct sip_server_tx *tx, int ms)
{
	LW_SCHED_DEL_UNREF(sched, tx->expire_id, lw_unref(tx));
	tx->expire_id = lw_sched_add(sched, ms, expire_cb, lw_ref(tx));
	if (tx->expire_id < 0) {
		lw_log(LOG_WARNING, "Unable to schedule expiry of %s\n", tx->branch);
		lw_unref(tx);
	}
}

int sip_server_tx_respond(struct sip_server_tx *tx, struct sip_message *resp)
{
	int code = resp->status;
	int res;
	SCOPED_LWLOCK(lock, tx);

	if (tx->state >= ST_COMPLETED) {
		lw_log(LOG_ERROR, "Response %d to %s, which was answered already\n", code, tx->branch);
		return -1;
	}

	lw_replace(tx->last, resp);
	res = sip_transport_send(&tx->dest, resp);

	if (code < 200) {
		set_state(tx, ST_PROCEEDING);
	} else if (!tx->is_invite) {
		set_state(tx, ST_COMPLETED);
		start_expiry(tx, tx->reliable ? 0 : 64 * T1_MS);
	} else if (code < 300) {
		/* From here on the dialog looks after retransmission of the 2xx. */
		set_state(tx, ST_TERMINATED);
		start_expiry(tx, 0);
	} else {
		set_state(tx, ST_COMPLETED);
		start_expiry(tx, 64 * T1_MS);
		if (!tx->reliable) {
			tx->resend_ms = T1_MS;
			tx->resend_id = lw_sched_add_variable(sched, T1_MS, resend_cb, lw_ref(tx), 1);
			if (tx->resend_id < 0) {
				lw_unref(tx);
			}
		}
	}

	return res;
}

/*!
 * \brief Feed a request that matched this transaction
 * \retval 1 it was a retransmission or an ACK and has been dealt with
 * \retval 0 the caller should process it
 */
int sip_server_tx_receive(struct sip_server_tx *tx, const struct sip_message *req)
{
	SCOPED_LWLOCK(lock, tx);

	if (req->method == SIP_ACK) {
		if (tx->is_invite && tx->state == ST_COMPLETED) {
			set_state(tx, ST_CONFIRMED);
			LW_SCHED_DEL_UNREF(sched, tx->resend_id, lw_unref(tx));
			start_expiry(tx, tx->reliable ? 0 : T4_MS);
			return 1;
		}
		return tx->state == ST_CONFIRMED;
	}

	switch (tx->state) {
	case ST_TRYING:
		return 1;
	case ST_PROCEEDING:
	case ST_COMPLETED:
		sip_transport_send(&tx->dest, tx->last);
		return 1;
	case ST_CONFIRMED:
	case ST_TERMINATED:
		return 1;
	}

	return 0;
}
