# Kaplan-Meier curves for shop light bulbs, written out by hand to show what survfit() does,
# with bootstrap confidence bands. Base R only.

#' Kaplan-Meier estimate.
#'
#' @param time   hours until the bulb failed or was taken down
#' @param failed TRUE when it failed, FALSE when it was removed while still working (censored)
#' @return data frame with one row per distinct failure time
kaplan_meier <- function(time, failed) {
  stopifnot(length(time) == length(failed), all(time > 0), is.logical(failed))
  at <- sort(unique(time[failed]))
  # A bulb removed at exactly the time another one fails still counts as having been at risk.
  at_risk <- vapply(at, function(t) sum(time >= t), numeric(1))
  deaths <- vapply(at, function(t) sum(time == t & failed), numeric(1))
  survival <- cumprod(1 - deaths / at_risk)
  # Greenwood's formula; undefined once nobody is left, hence the guard.
  term <- ifelse(at_risk > deaths, deaths / (at_risk * (at_risk - deaths)), NA)
  data.frame(time = at, at_risk, deaths, survival, se = survival * sqrt(cumsum(term)))
}

survival_at <- function(fit, t) {
  c(1, fit$survival)[findInterval(t, fit$time) + 1]
}

median_life <- function(fit) {
  reached <- fit$time[fit$survival <= 0.5]
  if (length(reached)) reached[1] else NA_real_
}

#' Percentile bootstrap on a common grid of times. Bulbs are resampled whole, so that the link
#' between a lifetime and its censoring flag is preserved.
bootstrap_band <- function(data, grid, replicates = 500, level = 0.95) {
  n <- nrow(data)
  draws <- replicate(replicates, {
    pick <- data[sample.int(n, replace = TRUE), ]
    if (!any(pick$failed)) return(rep(1, length(grid)))
    survival_at(kaplan_meier(pick$time, pick$failed), grid)
  })
  edge <- (1 - level) / 2
  band <- apply(draws, 1, quantile, probs = c(edge, 1 - edge))
  data.frame(grid, lower = band[1, ], upper = band[2, ])
}

set.seed(20240611)
n <- 120
bulbs <- data.frame(
  maker = factor(rep(c("Lumen", "Glow"), each = n / 2)),
  life = c(rweibull(n / 2, shape = 2.1, scale = 9000), rweibull(n / 2, shape = 1.2, scale = 7500)),
  removed = runif(n, 2000, 15000)
)
bulbs <- transform(bulbs, time = pmin(life, removed), failed = life <= removed)

by_maker <- split(bulbs, bulbs$maker)
fits <- lapply(by_maker, function(d) kaplan_meier(d$time, d$failed))

summary_table <- data.frame(
  bulbs = vapply(by_maker, nrow, integer(1)),
  failed = vapply(by_maker, function(d) sum(d$failed), integer(1)),
  median_hours = round(vapply(fits, median_life, numeric(1))),
  alive_5000h = round(vapply(fits, survival_at, numeric(1), t = 5000), 3)
)
print(summary_table)

grid <- seq(0, 14000, by = 250)
colours <- c(Glow = "#b2541c", Lumen = "#1f5f8b")
plot(NULL, xlim = range(grid), ylim = c(0, 1), las = 1,
     xlab = "hours in service", ylab = "share still working")
for (maker in names(fits)) {
  band <- bootstrap_band(by_maker[[maker]], grid)
  polygon(c(grid, rev(grid)), c(band$lower, rev(band$upper)),
          col = adjustcolor(colours[[maker]], alpha.f = 0.2), border = NA)
  lines(grid, survival_at(fits[[maker]], grid), type = "s", lwd = 2, col = colours[[maker]])
}
legend("topright", legend = names(fits), col = colours[names(fits)], lwd = 2, bty = "n")
