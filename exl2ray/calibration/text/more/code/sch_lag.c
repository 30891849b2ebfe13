// SPDX-License-Identifier: GPL-2.0-only
/*
 * sch_lag.c	Delay every packet by a fixed time, for testing protocols.
 *
 * Unlike its big brothers this one does not reorder, drop or corrupt. Since
 * the delay is the same for all, a plain FIFO is in order of departure.
 */

#include <linux/module.h>
#include <linux/slab.h>
#include <linux/types.h>
#include <linux/kernel.h>
#include <linux/skbuff.h>
#include <net/netlink.h>
#include <net/pkt_sched.h>

enum {
	TCA_LAG_UNSPEC,
	TCA_LAG_DELAY,		/* u64, nanoseconds */
	TCA_LAG_LIMIT,		/* u32, packets */
	__TCA_LAG_MAX
};
#define TCA_LAG_MAX (__TCA_LAG_MAX - 1)

struct lag_sched_data {
	u64			delay;
	struct qdisc_watchdog	watchdog;
};

struct lag_skb_cb {
	u64	depart;
};

static inline struct lag_skb_cb *lag_skb_cb(struct sk_buff *skb)
{
	qdisc_cb_private_validate(skb, sizeof(struct lag_skb_cb));
	return (struct lag_skb_cb *)qdisc_skb_cb(skb)->data;
}

static int lag_enqueue(struct sk_buff *skb, struct Qdisc *sch,
		       struct sk_buff **to_free)
{
	struct lag_sched_data *q = qdisc_priv(sch);

	if (unlikely(sch->q.qlen >= sch->limit))
		return qdisc_drop(skb, sch, to_free);

	/* The sender's socket must not be throttled by our queue. */
	if (q->delay > NSEC_PER_MSEC)
		skb_orphan(skb);

	lag_skb_cb(skb)->depart = ktime_get_ns() + q->delay;
	return qdisc_enqueue_tail(skb, sch);
}

static struct sk_buff *lag_dequeue(struct Qdisc *sch)
{
	struct lag_sched_data *q = qdisc_priv(sch);
	struct sk_buff *skb = qdisc_peek_head(sch);
	u64 depart;

	if (!skb)
		return NULL;

	depart = lag_skb_cb(skb)->depart;
	if (depart > ktime_get_ns()) {
		qdisc_watchdog_schedule_ns(&q->watchdog, depart);
		return NULL;
	}

	return qdisc_dequeue_head(sch);
}

static const struct nla_policy lag_policy[TCA_LAG_MAX + 1] = {
	[TCA_LAG_DELAY]	= { .type = NLA_U64 },
	[TCA_LAG_LIMIT]	= { .type = NLA_U32 },
};

static int lag_change(struct Qdisc *sch, struct nlattr *opt,
		      struct netlink_ext_ack *extack)
{
	struct lag_sched_data *q = qdisc_priv(sch);
	struct nlattr *tb[TCA_LAG_MAX + 1];
	u64 delay = q->delay;
	int err;

	err = nla_parse_nested(tb, TCA_LAG_MAX, opt, lag_policy, extack);
	if (err < 0)
		return err;

	if (tb[TCA_LAG_DELAY]) {
		delay = nla_get_u64(tb[TCA_LAG_DELAY]);
		if (delay > 60ULL * NSEC_PER_SEC) {
			NL_SET_ERR_MSG_ATTR(extack, tb[TCA_LAG_DELAY],
					    "delay is limited to one minute");
			return -ERANGE;
		}
	}

	sch_tree_lock(sch);
	if (tb[TCA_LAG_LIMIT])
		sch->limit = nla_get_u32(tb[TCA_LAG_LIMIT]);
	/* Packets already waiting keep the delay they were promised. */
	q->delay = delay;
	while (sch->q.qlen > sch->limit) {
		struct sk_buff *skb = qdisc_dequeue_head(sch);

		rtnl_kfree_skbs(skb, skb);
	}
	sch_tree_unlock(sch);

	return 0;
}

static int lag_init(struct Qdisc *sch, struct nlattr *opt,
		    struct netlink_ext_ack *extack)
{
	struct lag_sched_data *q = qdisc_priv(sch);

	qdisc_watchdog_init(&q->watchdog, sch);
	sch->limit = 1000;
	q->delay = 0;

	return opt ? lag_change(sch, opt, extack) : 0;
}

static void lag_reset(struct Qdisc *sch)
{
	struct lag_sched_data *q = qdisc_priv(sch);

	qdisc_reset_queue(sch);
	qdisc_watchdog_cancel(&q->watchdog);
}

static void lag_destroy(struct Qdisc *sch)
{
	struct lag_sched_data *q = qdisc_priv(sch);

	qdisc_watchdog_cancel(&q->watchdog);
}

static int lag_dump(struct Qdisc *sch, struct sk_buff *skb)
{
	struct lag_sched_data *q = qdisc_priv(sch);
	struct nlattr *nest;

	nest = nla_nest_start_noflag(skb, TCA_OPTIONS);
	if (!nest)
		goto nla_put_failure;

	if (nla_put_u64_64bit(skb, TCA_LAG_DELAY, q->delay, TCA_LAG_UNSPEC) ||
	    nla_put_u32(skb, TCA_LAG_LIMIT, sch->limit))
		goto nla_put_failure;

	return nla_nest_end(skb, nest);

nla_put_failure:
	nla_nest_cancel(skb, nest);
	return -1;
}

static struct Qdisc_ops lag_qdisc_ops __read_mostly = {
	.id		= "lag",
	.priv_size	= sizeof(struct lag_sched_data),
	.enqueue	= lag_enqueue,
	.dequeue	= lag_dequeue,
	.peek		= qdisc_peek_head,
	.init		= lag_init,
	.reset		= lag_reset,
	.destroy	= lag_destroy,
	.change		= lag_change,
	.dump		= lag_dump,
	.owner		= THIS_MODULE,
};

static int __init lag_module_init(void)
{
	return register_qdisc(&lag_qdisc_ops);
}

static void __exit lag_module_exit(void)
{
	unregister_qdisc(&lag_qdisc_ops);
}

module_init(lag_module_init);
module_exit(lag_module_exit);
MODULE_DESCRIPTION("Constant delay queueing discipline");
MODULE_LICENSE("GPL");
