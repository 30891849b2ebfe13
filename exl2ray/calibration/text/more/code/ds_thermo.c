// A one-wire thermometer on a GPIO line, shown to user space through hwmon.
//
// The sensor answers on a single open-drain wire. A master pulls the wire low to start every slot;
// the length of the pulse says whether it is a reset (480 us), a zero (60 us) or a one / a read (6 us).
// Timing only matters inside a slot, so interrupts are off for at most 70 us at a time.

#include <linux/delay.h>
#include <linux/gpio/consumer.h>
#include <linux/hwmon.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/of.h>
#include <linux/platform_device.h>

#define CMD_SKIP_ROM	0xcc
#define CMD_CONVERT	0x44
#define CMD_READ_PAD	0xbe

#define PAD_LEN		9
#define CONVERT_MS	750
#define MAX_AGE		msecs_to_jiffies(2000)

struct thermo {
	struct gpio_desc *wire;
	struct mutex lock;		/* one conversation on the wire at a time */
	unsigned long stamp;		/* jiffies of the last good reading */
	bool valid;
	long millideg;
};

static void wire_low(struct thermo *t)
{
	gpiod_direction_output(t->wire, 0);
}

static void wire_release(struct thermo *t)
{
	gpiod_direction_input(t->wire);
}

/* Returns 0 if somebody pulled the line low after our reset, -ENODEV if the line stayed high. */
static int bus_reset(struct thermo *t)
{
	unsigned long flags;
	int level;

	wire_low(t);
	usleep_range(480, 560);

	local_irq_save(flags);
	wire_release(t);
	udelay(70);
	level = gpiod_get_value(t->wire);
	local_irq_restore(flags);

	usleep_range(410, 500);
	return level ? -ENODEV : 0;
}

static void put_bit(struct thermo *t, bool bit)
{
	unsigned long flags;

	local_irq_save(flags);
	wire_low(t);
	udelay(bit ? 6 : 60);
	wire_release(t);
	udelay(bit ? 64 : 10);
	local_irq_restore(flags);
}

static bool get_bit(struct thermo *t)
{
	unsigned long flags;
	bool bit;

	local_irq_save(flags);
	wire_low(t);
	udelay(6);
	wire_release(t);
	udelay(9);
	bit = gpiod_get_value(t->wire);
	local_irq_restore(flags);
	udelay(55);
	return bit;
}

static void put_byte(struct thermo *t, u8 byte)
{
	int i;

	for (i = 0; i < 8; i++)
		put_bit(t, byte >> i & 1);
}

static u8 get_byte(struct thermo *t)
{
	u8 byte = 0;
	int i;

	for (i = 0; i < 8; i++)
		byte |= get_bit(t) << i;
	return byte;
}

/* x^8 + x^5 + x^4 + 1, least significant bit first. Over data plus checksum it comes out as zero. */
static u8 pad_crc(const u8 *p, size_t n)
{
	u8 crc = 0;

	while (n--) {
		int i;

		crc ^= *p++;
		for (i = 0; i < 8; i++)
			crc = crc & 1 ? crc >> 1 ^ 0x8c : crc >> 1;
	}
	return crc;
}

static int thermo_refresh(struct thermo *t)
{
	u8 pad[PAD_LEN];
	int i, err;

	if (t->valid && time_before(jiffies, t->stamp + MAX_AGE))
		return 0;

	err = bus_reset(t);
	if (err)
		goto fail;
	put_byte(t, CMD_SKIP_ROM);
	put_byte(t, CMD_CONVERT);
	if (msleep_interruptible(CONVERT_MS))
		return -EINTR;

	err = bus_reset(t);
	if (err)
		goto fail;
	put_byte(t, CMD_SKIP_ROM);
	put_byte(t, CMD_READ_PAD);
	for (i = 0; i < PAD_LEN; i++)
		pad[i] = get_byte(t);

	/* An all-zero pad has a valid checksum: a shorted wire looks exactly like 0.0 degrees. */
	if (pad_crc(pad, PAD_LEN) || !memchr_inv(pad, 0, PAD_LEN)) {
		err = -EIO;
		goto fail;
	}

	t->millideg = (s16)(pad[1] << 8 | pad[0]) * 1000L / 16;
	t->stamp = jiffies;
	t->valid = true;
	return 0;

fail:
	t->valid = false;
	return err;
}

static umode_t thermo_visible(const void *data, enum hwmon_sensor_types type, u32 attr, int channel)
{
	return type == hwmon_temp && attr == hwmon_temp_input ? 0444 : 0;
}

static int thermo_read(struct device *dev, enum hwmon_sensor_types type, u32 attr, int channel, long *val)
{
	struct thermo *t = dev_get_drvdata(dev);
	int err;

	err = mutex_lock_interruptible(&t->lock);
	if (err)
		return err;
	err = thermo_refresh(t);
	if (!err)
		*val = t->millideg;
	mutex_unlock(&t->lock);
	return err;
}

static const struct hwmon_ops thermo_ops = {
	.is_visible = thermo_visible,
	.read = thermo_read,
};

static const struct hwmon_channel_info * const thermo_channels[] = {
	HWMON_CHANNEL_INFO(temp, HWMON_T_INPUT),
	NULL
};

static const struct hwmon_chip_info thermo_chip = {
	.ops = &thermo_ops,
	.info = thermo_channels,
};

static int thermo_probe(struct platform_device *pdev)
{
	struct device *dev = &pdev->dev;
	struct device *hwmon;
	struct thermo *t;

	t = devm_kzalloc(dev, sizeof(*t), GFP_KERNEL);
	if (!t)
		return -ENOMEM;
	mutex_init(&t->lock);

	t->wire = devm_gpiod_get(dev, "wire", GPIOD_IN);
	if (IS_ERR(t->wire))
		return dev_err_probe(dev, PTR_ERR(t->wire), "no wire gpio\n");
	if (gpiod_cansleep(t->wire))
		return dev_err_probe(dev, -EINVAL, "wire must not hang off a slow expander\n");

	hwmon = devm_hwmon_device_register_with_info(dev, "onewire_thermo", t, &thermo_chip, NULL);
	return PTR_ERR_OR_ZERO(hwmon);
}

static const struct of_device_id thermo_match[] = {
	{ .compatible = "larkfield,onewire-thermo" },
	{ }
};
MODULE_DEVICE_TABLE(of, thermo_match);

static struct platform_driver thermo_driver = {
	.probe = thermo_probe,
	.driver = {
		.name = "onewire-thermo",
		.of_match_table = thermo_match,
	},
};
module_platform_driver(thermo_driver);

MODULE_DESCRIPTION("Bit-banged one-wire thermometer");
MODULE_LICENSE("GPL");
