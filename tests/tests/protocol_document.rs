//! docs/protocol.md names code, tests, knock-outs and planted mistakes that there are.

use mirror_net::planted::Bug;
use mirror_tests::model::rules::{RULES, named};
use mirror_tests::model::scenarios::KNOCK_OUTS;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const RULES_COUNT: u8 = 17;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document() -> String {
    std::fs::read_to_string(root().join("docs/protocol.md")).unwrap()
}

/// What stands between backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

/// For each rule the rows of its table: what they are about, and the names in them.
fn rules() -> BTreeMap<u8, BTreeMap<String, Vec<String>>> {
    let mut rules: BTreeMap<u8, BTreeMap<String, Vec<String>>> = BTreeMap::new();
    let mut current = None;
    for line in document().lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        match cells.as_slice() {
            [head, ""] if head.starts_with("rule ") => {
                current = head["rule ".len()..].parse().ok();
                rules.entry(current.unwrap()).or_default();
            }
            ["---", "---"] => {}
            [what, names] if line.starts_with('|') => {
                let Some(rule) = current.and_then(|rule| rules.get_mut(&rule)) else { continue };
                rule.insert((*what).to_owned(), quoted(names));
            }
            _ => current = None,
        }
    }
    rules
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            sources(&path, found);
        } else if name.ends_with(".rs") {
            found.push(path);
        }
    }
}

/// The names of all functions that are tests.
fn tests() -> BTreeSet<String> {
    let mut files = Vec::new();
    for package in ["mirror-net", "ublk-server", "ctl", "kmod", "tests"] {
        sources(&root().join(package), &mut files);
    }
    let mut names = BTreeSet::new();
    for file in files {
        let text = std::fs::read_to_string(file).unwrap();
        // Between the attribute and the function there may be other attributes and comments.
        for after in text.split("#[test]").skip(1) {
            let Some(line) = after.lines().find(|line| line.trim_start().starts_with("fn ")) else {
                continue;
            };
            let name = line.trim_start().trim_start_matches("fn ").split('(').next().unwrap_or_default();
            names.insert(name.to_owned());
        }
    }
    names
}

#[test]
fn every_rule_has_its_table() {
    let numbers: Vec<u8> = rules().into_keys().collect();
    assert_eq!(numbers, (1..=RULES_COUNT).collect::<Vec<_>>());
    let text = document();
    for number in 1..=RULES_COUNT {
        assert!(text.contains(&format!("\n### {number}. ")), "rule {number} has no section");
    }
    for (number, rows) in rules() {
        assert!(rows.get("tests").is_some_and(|tests| !tests.is_empty()), "rule {number} names no test");
    }
}

#[test]
fn the_code_and_the_tests_that_it_names_exist() {
    let tests = tests();
    for (number, rows) in rules() {
        for file in rows.get("code").into_iter().flatten() {
            assert!(root().join(file).is_file(), "rule {number}: there is no {file}");
        }
        for test in &rows["tests"] {
            assert!(tests.contains(test), "rule {number}: there is no test {test}");
        }
    }
}

#[test]
fn every_rule_of_the_model_is_named_where_it_belongs() {
    let mut found: BTreeMap<String, u8> = BTreeMap::new();
    for (number, rows) in rules() {
        for (row, missed) in [("knock-outs", true), ("second fences", false)] {
            for name in rows.get(row).into_iter().flatten() {
                let rule = named(name).unwrap_or_else(|| panic!("rule {number}: the model has no {name}"));
                let is_missed = KNOCK_OUTS.iter().any(|knock_out| knock_out.rule == rule && knock_out.missed);
                assert_eq!(is_missed, missed, "rule {number}: {name} stands among the {row}");
                assert_eq!(found.insert(name.clone(), number), None, "{name} is named twice");
            }
        }
    }
    let built: BTreeMap<String, u8> =
        RULES.iter().map(|(_, name, number, _)| ((*name).to_owned(), *number)).collect();
    assert_eq!(found, built);
}

#[test]
fn every_planted_mistake_is_named_once() {
    let mut found: Vec<String> =
        rules().into_values().filter_map(|mut rows| rows.remove("planted")).flatten().collect();
    found.sort_unstable();
    let mut built: Vec<String> = Bug::ALL.iter().map(|bug| bug.name().to_owned()).collect();
    built.sort_unstable();
    assert_eq!(found, built);
}
