/* pym-level-meter.c
 *
 * A vertical peak programme meter with hold and clip lamp.
 *
 * SPDX-License-Identifier: LGPL-3.0-or-later
 */

/**
 * SECTION:pym-level-meter
 * @title: PymLevelMeter
 * @short_description: A meter for the level of one channel
 *
 * #PymLevelMeter shows a level between #PymLevelMeter:floor and 0 dBFS. Feed
 * it from the main thread with pym_level_meter_push(); ballistics, peak hold
 * and redrawing are its own affair.
 */

#include "config.h"

#include <glib/gi18n-lib.h>
#include <math.h>

#include "pym-level-meter.h"

#define FALL_DB_PER_SECOND 20.0
#define HOLD_MICROSECONDS  (1500 * G_TIME_SPAN_MILLISECOND)

struct _PymLevelMeter
{
  GtkWidget parent_instance;

  gdouble floor;
  gdouble level;
  gdouble peak;
  gint64 peak_time;
  gint64 last_frame;
  guint tick_id;
  guint clipped : 1;
};

enum
{
  PROP_0,
  PROP_FLOOR,
  PROP_CLIPPED,
  N_PROPS
};

enum
{
  CLIP,
  N_SIGNALS
};

static GParamSpec *props[N_PROPS];
static guint signals[N_SIGNALS];

G_DEFINE_FINAL_TYPE (PymLevelMeter, pym_level_meter, GTK_TYPE_WIDGET)

static gboolean
on_tick (GtkWidget     *widget,
         GdkFrameClock *clock,
         gpointer       user_data)
{
  PymLevelMeter *self = PYM_LEVEL_METER (widget);
  gint64 now = gdk_frame_clock_get_frame_time (clock);
  gdouble elapsed = (now - self->last_frame) / (gdouble) G_USEC_PER_SEC;

  self->last_frame = now;
  self->level = MAX (self->level - FALL_DB_PER_SECOND * elapsed, self->floor);
  if (now - self->peak_time > HOLD_MICROSECONDS)
    self->peak = MAX (self->peak - FALL_DB_PER_SECOND * elapsed, self->level);

  gtk_widget_queue_draw (widget);

  if (self->peak <= self->floor)
    {
      /* Nothing moves any more: let the frame clock go to sleep. */
      self->tick_id = 0;
      return G_SOURCE_REMOVE;
    }

  return G_SOURCE_CONTINUE;
}

static void
set_clipped (PymLevelMeter *self,
             gboolean       clipped)
{
  if (self->clipped == clipped)
    return;

  self->clipped = clipped;
  gtk_accessible_update_state (GTK_ACCESSIBLE (self),
                               GTK_ACCESSIBLE_STATE_INVALID,
                               clipped ? GTK_ACCESSIBLE_INVALID_TRUE : GTK_ACCESSIBLE_INVALID_FALSE,
                               -1);
  g_object_notify_by_pspec (G_OBJECT (self), props[PROP_CLIPPED]);
  if (clipped)
    g_signal_emit (self, signals[CLIP], 0);
}

static void
pym_level_meter_snapshot (GtkWidget   *widget,
                          GtkSnapshot *snapshot)
{
  PymLevelMeter *self = PYM_LEVEL_METER (widget);
  float width = gtk_widget_get_width (widget);
  float height = gtk_widget_get_height (widget);
  float y = height * (self->level / self->floor);
  float y_peak = height * (self->peak / self->floor);
  GdkRGBA fg;

  gtk_widget_get_color (widget, &fg);
  gtk_snapshot_append_color (snapshot, &fg,
                             &GRAPHENE_RECT_INIT (0, y, width, height - y));

  if (self->peak > self->floor)
    gtk_snapshot_append_color (snapshot, &fg,
                               &GRAPHENE_RECT_INIT (0, y_peak, width, 2));

  if (self->clipped)
    gtk_snapshot_append_color (snapshot, &(GdkRGBA) { 0.88, 0.11, 0.14, 1.0 },
                               &GRAPHENE_RECT_INIT (0, 0, width, 5));
}

static void
pym_level_meter_measure (GtkWidget      *widget,
                         GtkOrientation  orientation,
                         int             for_size,
                         int            *minimum,
                         int            *natural,
                         int            *minimum_baseline,
                         int            *natural_baseline)
{
  if (orientation == GTK_ORIENTATION_HORIZONTAL)
    *minimum = *natural = 8;
  else
    {
      *minimum = 48;
      *natural = 160;
    }
}

static void
on_pressed (GtkGestureClick *gesture,
            int              n_press,
            double           x,
            double           y,
            PymLevelMeter   *self)
{
  set_clipped (self, FALSE);
}

static void
pym_level_meter_set_property (GObject      *object,
                              guint         prop_id,
                              const GValue *value,
                              GParamSpec   *pspec)
{
  PymLevelMeter *self = PYM_LEVEL_METER (object);

  switch (prop_id)
    {
    case PROP_FLOOR:
      self->floor = g_value_get_double (value);
      self->level = self->peak = self->floor;
      gtk_widget_queue_draw (GTK_WIDGET (self));
      break;

    case PROP_CLIPPED:
      set_clipped (self, g_value_get_boolean (value));
      break;

    default:
      G_OBJECT_WARN_INVALID_PROPERTY_ID (object, prop_id, pspec);
    }
}

static void
pym_level_meter_class_init (PymLevelMeterClass *klass)
{
  GObjectClass *object_class = G_OBJECT_CLASS (klass);
  GtkWidgetClass *widget_class = GTK_WIDGET_CLASS (klass);

  object_class->set_property = pym_level_meter_set_property;
  widget_class->snapshot = pym_level_meter_snapshot;
  widget_class->measure = pym_level_meter_measure;

  /**
   * PymLevelMeter:floor:
   *
   * The level in dBFS at the bottom of the scale.
   */
  props[PROP_FLOOR] =
    g_param_spec_double ("floor", NULL, NULL, -144.0, -6.0, -60.0,
                         G_PARAM_WRITABLE | G_PARAM_CONSTRUCT | G_PARAM_STATIC_STRINGS);
  props[PROP_CLIPPED] =
    g_param_spec_boolean ("clipped", NULL, NULL, FALSE,
                          G_PARAM_WRITABLE | G_PARAM_EXPLICIT_NOTIFY | G_PARAM_STATIC_STRINGS);
  g_object_class_install_properties (object_class, N_PROPS, props);

  signals[CLIP] = g_signal_new ("clip", G_TYPE_FROM_CLASS (klass),
                                G_SIGNAL_RUN_LAST, 0, NULL, NULL, NULL,
                                G_TYPE_NONE, 0);

  gtk_widget_class_set_css_name (widget_class, "levelmeter");
  gtk_widget_class_set_accessible_role (widget_class, GTK_ACCESSIBLE_ROLE_METER);
}

static void
pym_level_meter_init (PymLevelMeter *self)
{
  GtkGesture *click = gtk_gesture_click_new ();

  g_signal_connect (click, "pressed", G_CALLBACK (on_pressed), self);
  gtk_widget_add_controller (GTK_WIDGET (self), GTK_EVENT_CONTROLLER (click));
  gtk_widget_set_tooltip_text (GTK_WIDGET (self), _("Click to reset the clip lamp"));
}

/**
 * pym_level_meter_push:
 * @self: a #PymLevelMeter
 * @sample: the largest absolute sample value since the last call
 *
 * Tells the meter about new audio. Values of 1.0 and above light the clip
 * lamp, which stays lit until clicked.
 */
void
pym_level_meter_push (PymLevelMeter *self,
                      gfloat         sample)
{
  gdouble db;

  g_return_if_fail (PYM_IS_LEVEL_METER (self));

  db = sample > 0 ? 20 * log10 (sample) : -G_MAXDOUBLE;
  if (sample >= 1.0f)
    set_clipped (self, TRUE);
  if (db <= self->level)
    return;

  self->level = MIN (db, 0.0);
  if (self->level >= self->peak)
    {
      self->peak = self->level;
      self->peak_time = g_get_monotonic_time ();
    }

  if (self->tick_id == 0)
    {
      self->last_frame = g_get_monotonic_time ();
      self->tick_id = gtk_widget_add_tick_callback (GTK_WIDGET (self), on_tick, NULL, NULL);
    }
}
