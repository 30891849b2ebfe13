# Eleven snow stations send a packet every ten minutes by satellite modem. This is what receives them.

terraform {
  required_version = ">= 1.6"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.60"
    }
  }
  backend "s3" {
    bucket       = "snowdesk-terraform"
    key          = "receiver/terraform.tfstate"
    region       = "eu-central-1"
    use_lockfile = true
  }
}

provider "aws" {
  region = "eu-central-1"
  default_tags {
    tags = { project = "snowdesk", owner = "warning-service", season = var.season }
  }
}

variable "season" {
  type        = string
  description = "Winter, written 2026-27. Begins on 1 November for the budget, whatever the weather."
  validation {
    condition     = can(regex("^20\\d{2}-\\d{2}$", var.season)) && tonumber(substr(var.season, 5, 2)) == (tonumber(substr(var.season, 2, 2)) + 1) % 100
    error_message = "Write two following years, such as 2026-27."
  }
}

variable "stations" {
  type = map(object({
    altitude = number
    aspect   = optional(string, "flat")
    modem    = string
    silent_after_minutes = optional(number, 45)
  }))
}

variable "duty_phone" {
  type      = string
  sensitive = true
}

locals {
  high = { for name, s in var.stations : name => s if s.altitude >= 2400 }
  # Above the tree line the modems freeze at night; an alarm at 3 a.m. for each of them wakes the wrong people.
  patience = { for name, s in var.stations : name => contains(keys(local.high), name) ? max(s.silent_after_minutes, 120) : s.silent_after_minutes }
}

resource "aws_sqs_queue" "dead" {
  name                      = "snow-packets-unreadable"
  message_retention_seconds = 1209600
}

resource "aws_sqs_queue" "packets" {
  name                       = "snow-packets"
  visibility_timeout_seconds = 6 * aws_lambda_function.decode.timeout
  redrive_policy = jsonencode({
    deadLetterTargetArn = aws_sqs_queue.dead.arn
    maxReceiveCount     = 4
  })
}

resource "aws_dynamodb_table" "readings" {
  name         = "snow-readings-${var.season}"
  billing_mode = "PAY_PER_REQUEST"
  hash_key     = "station"
  range_key    = "taken_at"

  attribute {
    name = "station"
    type = "S"
  }
  attribute {
    name = "taken_at"
    type = "N"
  }

  point_in_time_recovery { enabled = true }

  lifecycle {
    prevent_destroy = true # courts have asked for the numbers of a given morning, nine years later
  }
}

data "archive_file" "decode" {
  type        = "zip"
  source_dir  = "${path.module}/decode"
  output_path = "${path.module}/.build/decode.zip"
  excludes    = ["tests", "__pycache__"]
}

resource "aws_lambda_function" "decode" {
  function_name    = "snow-decode"
  filename         = data.archive_file.decode.output_path
  source_code_hash = data.archive_file.decode.output_base64sha256
  handler          = "decode.handler"
  runtime          = "python3.12"
  architectures    = ["arm64"]
  timeout          = 20
  memory_size      = 256
  role             = aws_iam_role.decode.arn

  environment {
    variables = {
      TABLE    = aws_dynamodb_table.readings.name
      STATIONS = jsonencode({ for n, s in var.stations : s.modem => { name = n, altitude = s.altitude } })
    }
  }
}

resource "aws_lambda_event_source_mapping" "decode" {
  event_source_arn        = aws_sqs_queue.packets.arn
  function_name           = aws_lambda_function.decode.arn
  batch_size              = 10
  function_response_types = ["ReportBatchItemFailures"]
}

data "aws_iam_policy_document" "assume" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["lambda.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "decode" {
  name               = "snow-decode"
  assume_role_policy = data.aws_iam_policy_document.assume.json
}

resource "aws_iam_role_policy" "decode" {
  role = aws_iam_role.decode.id
  policy = jsonencode({
    Version = "2012-10-17"
    Statement = [
      { Effect = "Allow", Action = ["dynamodb:PutItem"], Resource = aws_dynamodb_table.readings.arn },
      { Effect = "Allow", Action = ["sqs:ReceiveMessage", "sqs:DeleteMessage", "sqs:GetQueueAttributes"], Resource = aws_sqs_queue.packets.arn },
      { Effect = "Allow", Action = ["cloudwatch:PutMetricData"], Resource = "*" },
    ]
  })
}

resource "aws_sns_topic" "duty" { name = "snow-duty" }

resource "aws_sns_topic_subscription" "phone" {
  topic_arn = aws_sns_topic.duty.arn
  protocol  = "sms"
  endpoint  = var.duty_phone
}

resource "aws_cloudwatch_metric_alarm" "silent" {
  for_each            = local.patience
  alarm_name          = "silent-${each.key}"
  alarm_description   = "${each.key} (${var.stations[each.key].altitude} m) has sent nothing for ${each.value} minutes."
  namespace           = "Snowdesk"
  metric_name         = "Packets"
  dimensions          = { Station = each.key }
  statistic           = "Sum"
  period              = each.value * 60
  evaluation_periods  = 1
  comparison_operator = "LessThanThreshold"
  threshold           = 1
  treat_missing_data  = "breaching"
  alarm_actions       = [aws_sns_topic.duty.arn]
}

output "ingest_url" {
  value       = aws_sqs_queue.packets.url
  description = "To be typed into the modem provider's web form, which accepts no more than 120 characters."
}
