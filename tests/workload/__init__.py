"""Tests of penstock.workload."""
