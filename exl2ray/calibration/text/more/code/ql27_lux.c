// SPDX-free on purpose: this copy lives in the out-of-tree bundle and the packager adds the header.
/*
 * Ambient light sensor "Quillon QL27" on I2C.
 *
 * The part has one 16-bit result register per channel (visible, infrared) and no interrupt line,
 * so all we can offer is polling through IIO. Integration time doubles as the resolution control:
 * at 25 ms a count is about 0.23 lux, at 800 ms about 0.0072 lux, and a bright window saturates
 * everything above 200 ms.
 */
#include <linux/bitfield.h>
#include <linux/delay.h>
#include <linux/i2c.h>
#include <linux/iio/iio.h>
#include <linux/iio/sysfs.h>
#include <linux/module.h>
#include <linux/pm_runtime.h>
#include <linux/regmap.h>
#include <linux/regulator/consumer.h>

#define QL27_REG_CONF		0x00
#define   QL27_CONF_SHUTDOWN	BIT(0)
#define   QL27_CONF_IT		GENMASK(9, 6)
#define   QL27_CONF_GAIN	GENMASK(12, 11)
#define QL27_REG_VIS		0x04
#define QL27_REG_IR		0x05
#define QL27_REG_ID		0x07
#define   QL27_ID_PART		GENMASK(7, 0)
#define   QL27_PART		0x81

#define QL27_STARTUP_US		4500	/* data sheet says 2.5 ms, rev A silicon needs more */
#define QL27_AUTOSUSPEND_MS	3000

struct ql27 {
	struct regmap *map;
	struct device *dev;
	struct mutex lock;	/* serialises CONF updates against a running conversion */
	unsigned int it_idx;
};

/* Index is what we expose, .code is what the chip wants: the encoding is not monotonic. */
static const struct {
	int usec;
	u8 code;
	int nlux_per_count;
} ql27_it[] = {
	{  25000, 0xc, 230400 },
	{  50000, 0x8, 115200 },
	{ 100000, 0x0,  57600 },
	{ 200000, 0x1,  28800 },
	{ 400000, 0x2,  14400 },
	{ 800000, 0x3,   7200 },
};

static const struct iio_chan_spec ql27_channels[] = {
	{
		.type = IIO_LIGHT,
		.address = QL27_REG_VIS,
		.info_mask_separate = BIT(IIO_CHAN_INFO_RAW) | BIT(IIO_CHAN_INFO_SCALE),
		.info_mask_shared_by_all = BIT(IIO_CHAN_INFO_INT_TIME),
		.info_mask_shared_by_all_available = BIT(IIO_CHAN_INFO_INT_TIME),
	}, {
		.type = IIO_INTENSITY,
		.modified = 1,
		.channel2 = IIO_MOD_LIGHT_IR,
		.address = QL27_REG_IR,
		.info_mask_separate = BIT(IIO_CHAN_INFO_RAW),
		.info_mask_shared_by_all = BIT(IIO_CHAN_INFO_INT_TIME),
	},
};

static int ql27_set_it(struct ql27 *ql, int val, int val2)
{
	int i, ret;

	if (val)
		return -EINVAL;
	for (i = 0; i < ARRAY_SIZE(ql27_it); i++)
		if (ql27_it[i].usec == val2)
			break;
	if (i == ARRAY_SIZE(ql27_it))
		return -EINVAL;

	mutex_lock(&ql->lock);
	ret = regmap_update_bits(ql->map, QL27_REG_CONF, QL27_CONF_IT,
				 FIELD_PREP(QL27_CONF_IT, ql27_it[i].code));
	if (!ret) {
		/* The running conversion finishes with the old time; throw it away. */
		fsleep(ql27_it[ql->it_idx].usec);
		ql->it_idx = i;
	}
	mutex_unlock(&ql->lock);
	return ret;
}

static int ql27_read_raw(struct iio_dev *indio, struct iio_chan_spec const *chan,
			 int *val, int *val2, long mask)
{
	struct ql27 *ql = iio_priv(indio);
	unsigned int reg;
	int ret;

	switch (mask) {
	case IIO_CHAN_INFO_RAW:
		ret = pm_runtime_resume_and_get(ql->dev);
		if (ret < 0)
			return ret;
		mutex_lock(&ql->lock);
		ret = regmap_read(ql->map, chan->address, &reg);
		mutex_unlock(&ql->lock);
		pm_runtime_mark_last_busy(ql->dev);
		pm_runtime_put_autosuspend(ql->dev);
		if (ret)
			return ret;
		if (reg == U16_MAX)
			dev_dbg_ratelimited(ql->dev, "channel %lu saturated\n", chan->address);
		*val = reg;
		return IIO_VAL_INT;
	case IIO_CHAN_INFO_SCALE:
		*val = 0;
		*val2 = ql27_it[ql->it_idx].nlux_per_count * 1000;
		return IIO_VAL_INT_PLUS_NANO;
	case IIO_CHAN_INFO_INT_TIME:
		*val = 0;
		*val2 = ql27_it[ql->it_idx].usec;
		return IIO_VAL_INT_PLUS_MICRO;
	default:
		return -EINVAL;
	}
}

static int ql27_write_raw(struct iio_dev *indio, struct iio_chan_spec const *chan,
			  int val, int val2, long mask)
{
	struct ql27 *ql = iio_priv(indio);
	int ret;

	if (mask != IIO_CHAN_INFO_INT_TIME)
		return -EINVAL;
	ret = pm_runtime_resume_and_get(ql->dev);
	if (ret < 0)
		return ret;
	ret = ql27_set_it(ql, val, val2);
	pm_runtime_mark_last_busy(ql->dev);
	pm_runtime_put_autosuspend(ql->dev);
	return ret;
}

static const struct iio_info ql27_info = {
	.read_raw = ql27_read_raw,
	.write_raw = ql27_write_raw,
};

static const struct regmap_config ql27_regmap = {
	.reg_bits = 8,
	.val_bits = 16,
	.max_register = QL27_REG_ID,
	.val_format_endian = REGMAP_ENDIAN_LITTLE,
};

static int ql27_probe(struct i2c_client *client)
{
	struct device *dev = &client->dev;
	struct iio_dev *indio;
	struct ql27 *ql;
	unsigned int id;
	int ret;

	indio = devm_iio_device_alloc(dev, sizeof(*ql));
	if (!indio)
		return -ENOMEM;
	ql = iio_priv(indio);
	ql->dev = dev;
	ql->it_idx = 2;
	mutex_init(&ql->lock);

	ret = devm_regulator_get_enable(dev, "vdd");
	if (ret)
		return dev_err_probe(dev, ret, "vdd\n");
	fsleep(QL27_STARTUP_US);

	ql->map = devm_regmap_init_i2c(client, &ql27_regmap);
	if (IS_ERR(ql->map))
		return PTR_ERR(ql->map);

	ret = regmap_read(ql->map, QL27_REG_ID, &id);
	if (ret)
		return dev_err_probe(dev, ret, "cannot read the part number\n");
	if (FIELD_GET(QL27_ID_PART, id) != QL27_PART)
		/* Second-source parts answer 0x00 but behave; complain and carry on. */
		dev_warn(dev, "unexpected part number %#x\n", id);

	indio->name = "ql27";
	indio->channels = ql27_channels;
	indio->num_channels = ARRAY_SIZE(ql27_channels);
	indio->info = &ql27_info;
	indio->modes = INDIO_DIRECT_MODE;

	pm_runtime_set_autosuspend_delay(dev, QL27_AUTOSUSPEND_MS);
	pm_runtime_use_autosuspend(dev);
	ret = devm_pm_runtime_enable(dev);
	if (ret)
		return ret;
	return devm_iio_device_register(dev, indio);
}

static int ql27_runtime_suspend(struct device *dev)
{
	struct ql27 *ql = iio_priv(dev_get_drvdata(dev));

	return regmap_set_bits(ql->map, QL27_REG_CONF, QL27_CONF_SHUTDOWN);
}

static int ql27_runtime_resume(struct device *dev)
{
	struct ql27 *ql = iio_priv(dev_get_drvdata(dev));
	int ret;

	ret = regmap_clear_bits(ql->map, QL27_REG_CONF, QL27_CONF_SHUTDOWN);
	if (ret)
		return ret;
	/* The first result after wake-up is stale until one full integration has passed. */
	fsleep(QL27_STARTUP_US + ql27_it[ql->it_idx].usec);
	return 0;
}

static DEFINE_RUNTIME_DEV_PM_OPS(ql27_pm, ql27_runtime_suspend, ql27_runtime_resume, NULL);

static const struct i2c_device_id ql27_ids[] = { { "ql27" }, { } };
MODULE_DEVICE_TABLE(i2c, ql27_ids);

static struct i2c_driver ql27_driver = {
	.driver = { .name = "ql27", .pm = pm_ptr(&ql27_pm) },
	.probe = ql27_probe,
	.id_table = ql27_ids,
};
module_i2c_driver(ql27_driver);

MODULE_DESCRIPTION("Quillon QL27 ambient light sensor");
MODULE_LICENSE("GPL");
