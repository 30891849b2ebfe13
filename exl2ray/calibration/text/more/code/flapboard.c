// SPDX-License-Identifier: GPL-2.0-only
/*
 * Split-flap departure board on SPI, one character device per row: write text, the flaps turn.
 *
 *   # printf 'PLATFORM 2  CALLING AT' > /dev/flap0
 *
 * Each module has 40 flaps and only turns forwards, so going from B to A takes 39 steps of 45 ms.
 * write() returns at once; poll() reports POLLOUT when the row has come to rest, and fsync() waits.
 */
#include <linux/cdev.h>
#include <linux/hrtimer.h>
#include <linux/idr.h>
#include <linux/module.h>
#include <linux/poll.h>
#include <linux/property.h>
#include <linux/spi/spi.h>
#include <linux/uaccess.h>
#include <linux/workqueue.h>

#define FLAP_MAX_MODULES	48
#define FLAP_MINORS		16
#define FLAP_STEP_MS		45

static const char drum[] = " ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-:";
#define DRUM_LEN	(sizeof(drum) - 1)

struct flap_row {
	struct spi_device *spi;
	struct cdev cdev;
	struct device dev;
	struct mutex lock;		/* target[], shown[], gone */
	wait_queue_head_t idle_wq;
	struct delayed_work step;
	unsigned int n;
	bool gone;
	u8 target[FLAP_MAX_MODULES];
	u8 shown[FLAP_MAX_MODULES];
	/* DMA-safe: own cache line, never on the stack */
	u8 tx[FLAP_MAX_MODULES / 8] ____cacheline_aligned;
};

static dev_t flap_base;
static DEFINE_IDA(flap_ida);
static const struct class flap_class = { .name = "flapboard" };

static int drum_index(char c)
{
	const char *p;

	if (c >= 'a' && c <= 'z')
		c -= 'a' - 'A';
	p = c ? strchr(drum, c) : NULL;
	return p ? p - drum : 0;
}

static bool row_idle(struct flap_row *row)
{
	return READ_ONCE(row->gone) || !memcmp(row->shown, row->target, row->n);
}

/* One step pulse for every module that is not where it should be. */
static void flap_step(struct work_struct *work)
{
	struct flap_row *row = container_of(to_delayed_work(work), struct flap_row, step);
	unsigned int i, moving = 0;
	int err;

	mutex_lock(&row->lock);
	memset(row->tx, 0, sizeof(row->tx));
	for (i = 0; i < row->n; i++) {
		if (row->shown[i] == row->target[i])
			continue;
		/* the shift registers are daisy-chained, so the last module goes out first */
		row->tx[(row->n - 1 - i) / 8] |= BIT(7 - (row->n - 1 - i) % 8);
		moving++;
	}
	if (!moving)
		goto out;

	err = spi_write(row->spi, row->tx, DIV_ROUND_UP(row->n, 8));
	if (err) {
		dev_err_ratelimited(&row->spi->dev, "step lost: %d\n", err);
	} else {
		for (i = 0; i < row->n; i++)
			if (row->shown[i] != row->target[i])
				row->shown[i] = (row->shown[i] + 1) % DRUM_LEN;
	}
	schedule_delayed_work(&row->step, msecs_to_jiffies(FLAP_STEP_MS));
out:
	mutex_unlock(&row->lock);
	if (row_idle(row))
		wake_up_interruptible(&row->idle_wq);
}

static int flap_open(struct inode *inode, struct file *file)
{
	struct flap_row *row = container_of(inode->i_cdev, struct flap_row, cdev);

	file->private_data = row;
	return stream_open(inode, file);
}

static ssize_t flap_write(struct file *file, const char __user *buf, size_t len, loff_t *pos)
{
	struct flap_row *row = file->private_data;
	char text[FLAP_MAX_MODULES + 1];
	size_t used = min_t(size_t, len, row->n);
	unsigned int i;
	ssize_t ret = len;	/* text that does not fit on the board is not an error */

	if (copy_from_user(text, buf, used))
		return -EFAULT;

	mutex_lock(&row->lock);
	if (row->gone) {
		ret = -ENODEV;
		goto out;
	}
	for (i = 0; i < row->n; i++)
		row->target[i] = i < used ? drum_index(text[i]) : 0;
	mod_delayed_work(system_wq, &row->step, 0);
out:
	mutex_unlock(&row->lock);
	return ret;
}

static __poll_t flap_poll(struct file *file, poll_table *wait)
{
	struct flap_row *row = file->private_data;

	poll_wait(file, &row->idle_wq, wait);
	if (READ_ONCE(row->gone))
		return EPOLLHUP | EPOLLERR;
	return row_idle(row) ? EPOLLOUT | EPOLLWRNORM : 0;
}

static int flap_fsync(struct file *file, loff_t start, loff_t end, int datasync)
{
	struct flap_row *row = file->private_data;
	int ret = wait_event_interruptible(row->idle_wq, row_idle(row));

	return ret ? ret : row->gone ? -ENODEV : 0;
}

static const struct file_operations flap_fops = {
	.owner = THIS_MODULE,
	.open = flap_open,
	.write = flap_write,
	.poll = flap_poll,
	.fsync = flap_fsync,
};

static void flap_release(struct device *dev)
{
	struct flap_row *row = container_of(dev, struct flap_row, dev);

	ida_free(&flap_ida, MINOR(dev->devt));
	put_device(&row->spi->dev);
	kfree(row);
}

static int flap_probe(struct spi_device *spi)
{
	struct flap_row *row;
	u32 n;
	int ret, minor;

	ret = device_property_read_u32(&spi->dev, "modules", &n);
	if (ret || n == 0 || n > FLAP_MAX_MODULES)
		return dev_err_probe(&spi->dev, ret ?: -EINVAL, "bad or missing \"modules\"\n");

	row = kzalloc(sizeof(*row), GFP_KERNEL);
	if (!row)
		return -ENOMEM;
	minor = ida_alloc_max(&flap_ida, FLAP_MINORS - 1, GFP_KERNEL);
	if (minor < 0) {
		kfree(row);
		return minor;
	}

	row->spi = spi;
	row->n = n;
	mutex_init(&row->lock);
	init_waitqueue_head(&row->idle_wq);
	INIT_DELAYED_WORK(&row->step, flap_step);
	/*
	 * There is no position feedback. Claim that everything shows the flap after blank and turn
	 * the whole way round: the home magnet makes modules swallow pulses until the row is level.
	 */
	memset(row->shown, 1, n);
	get_device(&spi->dev);

	device_initialize(&row->dev);
	row->dev.class = &flap_class;
	row->dev.parent = &spi->dev;
	row->dev.release = flap_release;
	row->dev.devt = MKDEV(MAJOR(flap_base), minor);
	dev_set_name(&row->dev, "flap%d", minor);
	cdev_init(&row->cdev, &flap_fops);

	ret = cdev_device_add(&row->cdev, &row->dev);
	if (ret) {
		put_device(&row->dev);	/* frees row */
		return ret;
	}
	spi_set_drvdata(spi, row);
	schedule_delayed_work(&row->step, 0);
	return 0;
}

static void flap_remove(struct spi_device *spi)
{
	struct flap_row *row = spi_get_drvdata(spi);

	cdev_device_del(&row->cdev, &row->dev);
	mutex_lock(&row->lock);
	row->gone = true;
	memcpy(row->target, row->shown, row->n);
	mutex_unlock(&row->lock);
	cancel_delayed_work_sync(&row->step);
	wake_up_interruptible(&row->idle_wq);
	put_device(&row->dev);
}

static const struct spi_device_id flap_spi_ids[] = {
	{ "flapboard" },
	{ }
};
MODULE_DEVICE_TABLE(spi, flap_spi_ids);

static struct spi_driver flap_driver = {
	.driver = { .name = "flapboard" },
	.probe = flap_probe,
	.remove = flap_remove,
	.id_table = flap_spi_ids,
};

static int __init flap_init(void)
{
	int ret = alloc_chrdev_region(&flap_base, 0, FLAP_MINORS, "flap");

	if (ret)
		return ret;
	ret = class_register(&flap_class);
	if (ret)
		goto err_region;
	ret = spi_register_driver(&flap_driver);
	if (ret)
		goto err_class;
	return 0;

err_class:
	class_unregister(&flap_class);
err_region:
	unregister_chrdev_region(flap_base, FLAP_MINORS);
	return ret;
}
module_init(flap_init);

static void __exit flap_exit(void)
{
	spi_unregister_driver(&flap_driver);
	class_unregister(&flap_class);
	unregister_chrdev_region(flap_base, FLAP_MINORS);
}
module_exit(flap_exit);

MODULE_DESCRIPTION("Split-flap departure board rows");
MODULE_LICENSE("GPL");
