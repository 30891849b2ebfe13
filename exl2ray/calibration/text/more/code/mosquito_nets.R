# Did the new window screens reduce bites? Village trial, two rainy seasons, stepped roll-out.
#
# Every household was surveyed once a week; `bites` is the number of bites reported for the youngest
# child. Counts are overdispersed and households differ, hence a negative binomial mixed model.

suppressPackageStartupMessages({
  library(dplyr)
  library(readr)
  library(tidyr)
  library(ggplot2)
  library(glmmTMB)
})

survey <- read_csv(
  "data/survey.csv",
  col_types = cols(
    household = col_character(),
    week      = col_date("%d/%m/%Y"),
    bites     = col_integer(),
    sleepers  = col_integer(),
    .default  = col_guess()
  ),
  na = c("", "NA", "absent", "99")
)

rollout <- read_csv("data/rollout.csv", col_types = "cDc") |>
  rename(fitted_on = date, batch = carpenter)

stopifnot(
  !anyDuplicated(survey[c("household", "week")]),
  all(survey$household %in% rollout$household)
)

d <- survey |>
  left_join(rollout, by = "household") |>
  filter(!is.na(bites)) |>
  mutate(
    # nobody gets credit for the week in which the carpenter came and the windows stood open
    days_since = as.integer(week - fitted_on),
    phase = cut(days_since, c(-Inf, -1, 6, Inf), labels = c("before", "fitting", "after")),
    season = if_else(week < as.Date("2022-06-01"), "first", "second"),
    doy = as.integer(format(week, "%j"))
  ) |>
  filter(phase != "fitting") |>
  mutate(
    screened = as.integer(phase == "after"),
    s1 = sin(2 * pi * doy / 365.25),
    c1 = cos(2 * pi * doy / 365.25)
  )

message(n_distinct(d$household), " households, ", nrow(d), " weeks, ",
        sprintf("%.1f%% zero", 100 * mean(d$bites == 0)))

fit <- glmmTMB(
  bites ~ screened + s1 + c1 + season + offset(log(pmax(sleepers, 1))) + (1 + screened | household),
  family = nbinom2,
  data = d
)

# Poisson for comparison only: its standard errors are far too small here
pois <- update(fit, family = poisson)
print(AIC(pois, fit))

rate_ratio <- function(model, term = "screened", level = 0.95) {
  est <- fixef(model)$cond[[term]]
  se <- sqrt(vcov(model)$cond[term, term])
  z <- qnorm(1 - (1 - level) / 2)
  setNames(exp(est + c(0, -z, z)), c("ratio", "low", "high"))
}
rr <- rate_ratio(fit)
cat(sprintf("bites with screens: %.2f of those without (%.2f to %.2f)\n", rr["ratio"], rr["low"], rr["high"]))

# A placebo: pretend that the screens came eight weeks early and look only at weeks before they did.
placebo <- d |>
  filter(screened == 0) |>
  mutate(screened = as.integer(days_since >= -56)) |>
  (\(x) update(fit, data = x, . ~ . - (1 + screened | household) + (1 | household)))()
cat("placebo: ", format(rate_ratio(placebo), digits = 2), "\n")

event <- d |>
  mutate(rel_week = pmin(pmax(days_since %/% 7, -12), 20)) |>
  summarise(
    mean_bites = weighted.mean(bites / sleepers, sleepers, na.rm = TRUE),
    n = n(),
    .by = c(rel_week, season)
  ) |>
  complete(rel_week = -12:20, season)

p <- ggplot(event, aes(rel_week, mean_bites, colour = season)) +
  annotate("rect", xmin = -0.5, xmax = 0.5, ymin = -Inf, ymax = Inf, alpha = 0.15) +
  geom_line(na.rm = TRUE) +
  geom_point(aes(size = n), na.rm = TRUE) +
  scale_size_area(max_size = 4, guide = "none") +
  scale_colour_manual(values = c(first = "#8c510a", second = "#01665e")) +
  labs(x = "weeks since the screens were fitted", y = "bites per sleeper and week", colour = "rainy season") +
  theme_minimal(base_size = 11) +
  theme(legend.position = c(0.85, 0.85))

ggsave("figures/event_study.pdf", p, width = 16, height = 9, units = "cm")
saveRDS(list(fit = fit, ratio = rr), "models/screens.rds")
