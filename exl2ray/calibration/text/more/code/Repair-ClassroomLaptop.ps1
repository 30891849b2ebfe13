#Requires -Version 5.1
#Requires -RunAsAdministrator
<#
.SYNOPSIS
    Puts a trolley of classroom laptops back into the state of the first school day.
.DESCRIPTION
    For each laptop: removes profiles nobody has used for a term, frees disk space, checks that the disk is encrypted and
    that the clock is right (an exam begins at the same minute for everybody), and reports what a human must look at.
    Laptops that do not answer are tried again at the end, since half of them are still booting when the trolley opens.
.PARAMETER Trolley
    Letter of the trolley; names are taken from the asset list, e.g. C-07 is trolley C, slot 7.
.EXAMPLE
    .\Repair-ClassroomLaptop.ps1 -Trolley C -WhatIf
#>
[CmdletBinding(SupportsShouldProcess, ConfirmImpact = 'Medium')]
param(
    [Parameter(Mandatory)]
    [ValidatePattern('^[A-H]$')]
    [string] $Trolley,

    [ValidateScript({ Test-Path -LiteralPath $_ -PathType Leaf })]
    [string] $AssetList = "$PSScriptRoot\assets.csv",

    [int] $KeepProfileDays = 120,

    [ValidateRange(1, 32)]
    [int] $Throttle = 8
)

Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

$work = {
    param([int] $KeepDays, [bool] $Really)

    $result = [ordered]@{
        Name = $env:COMPUTERNAME; FreeGB = 0; Removed = 0; Encrypted = $null; SkewSeconds = $null; Battery = $null
        Notes = [System.Collections.Generic.List[string]]::new()
    }

    $limit = (Get-Date).AddDays(-$KeepDays)
    $profiles = Get-CimInstance Win32_UserProfile |
        Where-Object { -not $_.Special -and -not $_.Loaded -and $_.LocalPath -notmatch '\\(exam|teacher)\w*$' }
    foreach ($p in $profiles) {
        # LastUseTime is touched by the virus scanner; the hive of the user is not.
        $hive = Join-Path $p.LocalPath 'NTUSER.DAT'
        $used = if (Test-Path -LiteralPath $hive) { (Get-Item -LiteralPath $hive -Force).LastWriteTime } else { [datetime]::MinValue }
        if ($used -lt $limit) {
            $homework = @(Get-ChildItem -LiteralPath (Join-Path $p.LocalPath 'Desktop') -File -Recurse -ErrorAction SilentlyContinue |
                Where-Object Extension -in '.docx', '.odt', '.py', '.sb3')
            if ($homework.Count -gt 0) {
                $result.Notes.Add("$(Split-Path $p.LocalPath -Leaf) left $($homework.Count) file(s) on the desktop, profile kept")
                continue
            }
            if ($Really) { $p | Remove-CimInstance }
            $result.Removed++
        }
    }

    $result.FreeGB = [math]::Round((Get-PSDrive C).Free / 1GB, 1)
    try {
        $volume = Get-BitLockerVolume -MountPoint C:
        $result.Encrypted = $volume.ProtectionStatus -eq 'On'
        if (-not $result.Encrypted) { $result.Notes.Add("BitLocker: $($volume.VolumeStatus), $($volume.EncryptionPercentage) %") }
    } catch {
        $result.Notes.Add("BitLocker: $($_.Exception.Message)")
    }

    $skew = w32tm /stripchart /computer:time.school.lan /samples:1 /dataonly 2>&1 | Select-Object -Last 1
    if ("$skew" -match '([+-]\d+\.\d+)s') {
        $result.SkewSeconds = [double]::Parse($Matches[1], [cultureinfo]::InvariantCulture)
        if ([math]::Abs($result.SkewSeconds) -gt 5 -and $Really) { $null = w32tm /resync /force }
    } else {
        $result.Notes.Add('no answer from the time server')
    }

    $full = (Get-CimInstance -Namespace root/wmi BatteryFullChargedCapacity -ErrorAction SilentlyContinue).FullChargedCapacity
    $design = (Get-CimInstance -Namespace root/wmi BatteryStaticData -ErrorAction SilentlyContinue).DesignedCapacity
    if ($full -and $design) { $result.Battery = [int](100 * $full / $design) }

    [pscustomobject] $result
}

$names = Import-Csv -LiteralPath $AssetList -Delimiter ';' |
    Where-Object { $_.Trolley -eq $Trolley -and $_.State -ne 'repair' } |
    Sort-Object { [int] $_.Slot } |
    ForEach-Object { 'LT-{0}-{1:d2}' -f $_.Trolley, [int] $_.Slot }
if (-not $names) { throw "The list has no laptops in trolley $Trolley." }

$really = $PSCmdlet.ShouldProcess("$(@($names).Count) laptops of trolley $Trolley", "remove profiles older than $KeepProfileDays days")
$pending = @($names)
$done = foreach ($round in 1..2) {
    if (-not $pending) { break }
    if ($round -eq 2) { Write-Verbose "Waiting for $($pending -join ', ')"; Start-Sleep -Seconds 90 }
    $answers = @(Invoke-Command -ComputerName $pending -ThrottleLimit $Throttle -ScriptBlock $work `
        -ArgumentList $KeepProfileDays, $really -ErrorAction SilentlyContinue -ErrorVariable failures)
    $answers
    $pending = @($pending | Where-Object { $_ -notin $answers.Name })
}

$done | Sort-Object Name | Format-Table Name, FreeGB, Removed, Encrypted, SkewSeconds, @{ n = 'Battery %'; e = { $_.Battery } } -AutoSize
foreach ($d in $done | Where-Object { $_.Notes.Count }) { Write-Warning "$($d.Name): $($d.Notes -join '; ')" }
foreach ($f in $failures) { Write-Verbose $f.Exception.Message }
if ($pending) {
    Write-Warning "No answer: $($pending -join ', '). Lid shut, flat, or borrowed by the chess club."
    exit 3
}
