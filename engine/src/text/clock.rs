//! `strftime` for templates that print the date. UTC: a server's zone is no business of a prompt.

use std::{
    fmt::Write as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// `when` in `format`, with C's letters in the C locale; unknown ones are printed as they stand.
/// A `-` after the `%` leaves out leading zeros.
pub(super) fn strftime(when: SystemTime, format: &str) -> String {
    let seconds = when.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let (year, month, day) = civil(days);
    let weekday = (days + 4) % 7;
    let day_of_year = days - days_before_year(year) + 1;
    let hour12 = (hour + 11) % 12 + 1;
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[weekday as usize];

    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut letter = chars.next();
        let bare = letter == Some('-');
        if bare {
            letter = chars.next();
        }
        let mut number = |value: u64, width: usize| {
            let _ = write!(out, "{value:0width$}", width = if bare { 1 } else { width });
        };
        match letter {
            Some('Y') => number(year, 4),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('j') => number(day_of_year, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second % 60, 2),
            Some('w') => number(weekday, 1),
            Some('B') => out.push_str(month_name),
            Some('b' | 'h') => out.push_str(&month_name[..3]),
            Some('A') => out.push_str(day_name),
            Some('a') => out.push_str(&day_name[..3]),
            Some('p') => out.push_str(if hour < 12 { "AM" } else { "PM" }),
            Some('F') => out.push_str(&strftime(when, "%Y-%m-%d")),
            Some('T' | 'X') => out.push_str(&strftime(when, "%H:%M:%S")),
            Some('D' | 'x') => out.push_str(&strftime(when, "%m/%d/%y")),
            Some('e') => {
                let _ = write!(out, "{day:2}");
            }
            Some('Z') => out.push_str("UTC"),
            Some('z') => out.push_str("+0000"),
            Some('%') => out.push('%'),
            other => out.extend(std::iter::once('%').chain(other)),
        }
    }
    out
}

/// Days from 1970-01-01 to 1 January of `year`.
fn days_before_year(year: u64) -> u64 {
    let before = year - 1;
    before * 365 + before / 4 - before / 100 + before / 400 - 719_162
}

/// Year, month and day of a day since 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before_year(year + 1) <= days {
        year += 1;
    }
    let mut rest = days - days_before_year(year);
    let leap = days_before_year(year + 1) - days_before_year(year) == 366;
    for (month, length) in
        [31, 28 + u64::from(leap), 31, 30, 31, 30, 31, 31, 30, 31, 30, 31].into_iter().enumerate()
    {
        if rest < length {
            return (year, month as u64 + 1, rest + 1);
        }
        rest -= length;
    }
    unreachable!("a day of the year lies in one of its months")
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::strftime;

    #[test]
    fn dates_are_those_of_the_calendar() {
        // Checked with `date -u -d @N`.
        for (seconds, text) in [
            (0, "1970-01-01 Thu 001 12 AM"),
            (951_782_400, "2000-02-29 Tue 060 12 AM"),
            (1_735_689_599, "2024-12-31 Tue 366 11 PM"),
            (4_107_542_399, "2100-02-28 Sun 059 11 PM"),
            (4_107_542_400, "2100-03-01 Mon 060 12 AM"),
        ] {
            assert_eq!(strftime(UNIX_EPOCH + Duration::from_secs(seconds), "%Y-%m-%d %a %j %I %p"), text);
        }
        let day = UNIX_EPOCH + Duration::from_secs(1_720_137_600 + 3_723);
        assert_eq!(
            strftime(day, "%d %b %Y, %B %-d %A %H:%M:%S %e|%q%%"),
            "05 Jul 2024, July 5 Friday 01:02:03  5|%q%"
        );
    }
}
