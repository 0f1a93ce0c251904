// Wakes the page up: charts, tables, the calculator. All data are in the page.

document.documentElement.classList.add("js");
const data = JSON.parse(document.getElementById("data").textContent);
document.querySelectorAll("table.sortable").forEach(sortable);
document.querySelectorAll("figure.chart").forEach((figure) => Chart(figure, data.charts[figure.dataset.chart]));
const form = document.querySelector("form.calculator");
if (form && data.calculator) CalculatorForm(form, data.calculator);
