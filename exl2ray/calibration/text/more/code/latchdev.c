// SPDX-License-Identifier: GPL-2.0
/*
 * latchdev - a character device that lets at most N processes through at a time
 *
 * Opening /dev/latch blocks (or fails with EAGAIN under O_NONBLOCK) while all slots are taken. Closing,
 * also by dying, frees the slot. The build farm uses it to bound the number of linkers per machine.
 */
#define pr_fmt(fmt) KBUILD_MODNAME ": " fmt

#include <linux/cdev.h>
#include <linux/debugfs.h>
#include <linux/fs.h>
#include <linux/list.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/spinlock.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

static unsigned int slots = 2;

struct holder {
	struct list_head node;
	pid_t pid;
	char comm[TASK_COMM_LEN];
	ktime_t since;
};

static LIST_HEAD(holders);
static unsigned int held;
static DEFINE_SPINLOCK(lock);
static DECLARE_WAIT_QUEUE_HEAD(queue);
static atomic_t waiting = ATOMIC_INIT(0);
static struct dentry *dbg;

static bool try_enter(struct holder *h)
{
	bool got = false;

	spin_lock(&lock);
	if (held < READ_ONCE(slots)) {
		held++;
		h->since = ktime_get();
		list_add_tail(&h->node, &holders);
		got = true;
	}
	spin_unlock(&lock);
	return got;
}

static int latch_open(struct inode *inode, struct file *file)
{
	struct holder *h;
	int err = 0;

	h = kzalloc(sizeof(*h), GFP_KERNEL);
	if (!h)
		return -ENOMEM;
	h->pid = task_tgid_nr(current);
	get_task_comm(h->comm, current);

	if (!try_enter(h)) {
		if (file->f_flags & O_NONBLOCK) {
			err = -EAGAIN;
		} else {
			/*
			 * Exclusive, so that a freed slot wakes one linker and not sixty. First come, first
			 * served is not promised: a newcomer may slip in before the one just woken.
			 */
			atomic_inc(&waiting);
			err = wait_event_interruptible_exclusive(queue, try_enter(h));
			atomic_dec(&waiting);
		}
	}
	if (err) {
		kfree(h);
		return err;
	}
	file->private_data = h;
	return nonseekable_open(inode, file);
}

static int latch_release(struct inode *inode, struct file *file)
{
	struct holder *h = file->private_data;

	spin_lock(&lock);
	list_del(&h->node);
	held--;
	spin_unlock(&lock);
	kfree(h);
	wake_up_interruptible(&queue);
	return 0;
}

/* "<held> <slots> <waiting>\n" */
static ssize_t latch_read(struct file *file, char __user *buf, size_t len, loff_t *pos)
{
	char text[48];
	int n;

	n = scnprintf(text, sizeof(text), "%u %u %d\n", READ_ONCE(held), READ_ONCE(slots), atomic_read(&waiting));
	if (len < n)
		return -EINVAL;
	return copy_to_user(buf, text, n) ? -EFAULT : n;
}

static __poll_t latch_poll(struct file *file, poll_table *pt)
{
	/* Who holds a slot may ask whether others would like to have it: readable means somebody waits. */
	poll_wait(file, &queue, pt);
	return atomic_read(&waiting) ? EPOLLIN | EPOLLRDNORM : 0;
}

static const struct file_operations latch_fops = {
	.owner   = THIS_MODULE,
	.open    = latch_open,
	.release = latch_release,
	.read    = latch_read,
	.poll    = latch_poll,
};

static struct miscdevice latch_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name  = "latch",
	.fops  = &latch_fops,
	.mode  = 0666,
};

static int holders_show(struct seq_file *m, void *unused)
{
	struct holder *h;
	ktime_t now = ktime_get();

	spin_lock(&lock);
	list_for_each_entry(h, &holders, node)
		seq_printf(m, "%7d %-16s %8lld ms\n", h->pid, h->comm, ktime_ms_delta(now, h->since));
	spin_unlock(&lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(holders);

static int set_slots(const char *val, const struct kernel_param *kp)
{
	unsigned int old = slots, n;
	int err = kstrtouint(val, 0, &n);

	if (err)
		return err;
	if (n == 0 || n > 1024)
		return -ERANGE;
	WRITE_ONCE(slots, n);
	/* More room: let as many in as there is. Less room: nobody is thrown out, it just drains. */
	if (n > old)
		wake_up_interruptible_nr(&queue, n - old);
	return 0;
}

static const struct kernel_param_ops slots_ops = {
	.set = set_slots,
	.get = param_get_uint,
};
module_param_cb(slots, &slots_ops, &slots, 0644);
MODULE_PARM_DESC(slots, "how many openers are let through at a time");

static int __init latch_init(void)
{
	int err = misc_register(&latch_misc);

	if (err) {
		pr_err("cannot register: %d\n", err);
		return err;
	}
	dbg = debugfs_create_dir("latch", NULL);
	debugfs_create_file("holders", 0444, dbg, NULL, &holders_fops);
	pr_info("%u slots\n", slots);
	return 0;
}

static void __exit latch_exit(void)
{
	debugfs_remove_recursive(dbg);
	misc_deregister(&latch_misc);
}

module_init(latch_init);
module_exit(latch_exit);

MODULE_DESCRIPTION("Counting latch as a character device");
MODULE_LICENSE("GPL");
