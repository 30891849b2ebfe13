# Do four readers see the same rings? Agreement, bias and an ageing-error matrix for plaice otoliths, 2022 exchange.
#
# Run with: Rscript otolith_ageing.R exchange2022.csv
# Columns: fish, length_cm, reader, stain (y/n), age. One line per reading; some readers did some fish twice.

suppressPackageStartupMessages({
  library(dplyr)
  library(tidyr)
  library(ggplot2)
})

path <- commandArgs(trailingOnly = TRUE)[1]
stopifnot("give me a file" = !is.na(path), file.exists(path))

raw <- readr::read_csv(path, col_types = "fdfcd", na = c("", "NA", "unreadable"))

readings <- raw |>
  filter(!is.na(age)) |>
  group_by(fish) |>
  filter(n_distinct(reader) >= 3) |>
  mutate(modal = as.integer(names(which.max(table(age))))) |>
  ungroup()

message(nrow(raw) - nrow(readings), " readings left out (unreadable, or fewer than three readers)")

# ---- Agreement ----------------------------------------------------------------------------------------------------

cv <- function(x) if (length(x) < 2 || mean(x) == 0) NA_real_ else sd(x) / mean(x)

per_fish <- readings |>
  summarise(cv = cv(age), agree = mean(age == modal), .by = c(fish, modal, length_cm))

by_age <- per_fish |>
  summarise(n = n(), mean_cv = mean(cv, na.rm = TRUE), agreement = mean(agree), .by = modal) |>
  arrange(modal)
print(as.data.frame(by_age), digits = 2, row.names = FALSE)

# Bowker's test of symmetry between two readers: does one of them see more rings than the other?
bowker <- function(a, b) {
  lev <- sort(unique(c(a, b)))
  m <- table(factor(a, lev), factor(b, lev))
  up <- m[upper.tri(m)]
  lo <- t(m)[upper.tri(m)]
  use <- up + lo > 0
  chi <- sum((up[use] - lo[use])^2 / (up[use] + lo[use]))
  c(chisq = chi, df = sum(use), p = pchisq(chi, sum(use), lower.tail = FALSE))
}

wide <- readings |>
  summarise(age = round(median(age)), .by = c(fish, reader)) |>
  pivot_wider(names_from = reader, values_from = age)

pairs <- combn(setdiff(names(wide), "fish"), 2, simplify = FALSE)
symmetry <- bind_rows(lapply(pairs, function(p) {
  ok <- complete.cases(wide[p])
  tibble(pair = paste(p, collapse = " / "), n = sum(ok), as_tibble_row(bowker(wide[[p[1]]][ok], wide[[p[2]]][ok])),
         difference = mean(wide[[p[1]]][ok] - wide[[p[2]]][ok]))
})) |>
  mutate(p_holm = p.adjust(p, "holm"))
print(symmetry)

# ---- What the assessment needs: probability of the age read, given the true one --------------------------------------

# The modal age stands in for the truth. Up to 12+; beyond that there are too few fish to say anything.
plus <- 12L
error_matrix <- readings |>
  mutate(across(c(modal, age), \(x) pmin(as.integer(x), plus))) |>
  count(modal, age) |>
  complete(modal = 0:plus, age = 0:plus, fill = list(n = 0)) |>
  mutate(share = (n + 0.5 * (abs(age - modal) <= 1)) / sum(n + 0.5 * (abs(age - modal) <= 1)), .by = modal)

stopifnot(all(abs(tapply(error_matrix$share, error_matrix$modal, sum) - 1) < 1e-9))

write.table(
  pivot_wider(error_matrix[c("modal", "age", "share")], names_from = age, values_from = share),
  "ageing_error.dat", quote = FALSE, row.names = FALSE
)

# ---- Does staining help? -----------------------------------------------------------------------------------------------

fit <- glm(cbind(sum_ok, n - sum_ok) ~ stain * poly(modal, 2), family = quasibinomial,
           data = readings |> summarise(sum_ok = sum(age == modal), n = n(), .by = c(modal, stain)))
print(anova(fit, test = "F"))

p <- ggplot(readings, aes(modal, age - modal)) +
  geom_hline(yintercept = 0, linewidth = 0.3) +
  geom_count(aes(size = after_stat(prop), group = modal), alpha = 0.5) +
  stat_summary(fun.data = mean_cl_normal, colour = "firebrick", size = 0.2) +
  facet_wrap(vars(reader)) +
  scale_size_area(max_size = 5, labels = scales::label_percent(), name = "of readings") +
  scale_x_continuous(breaks = seq(0, 20, 4)) +
  labs(x = "modal age (years)", y = "rings too many or too few") +
  theme_minimal(base_size = 10)
ggsave("bias_by_reader.pdf", p, width = 180, height = 120, units = "mm")
